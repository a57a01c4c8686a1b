"""A small grammar of review sentences, our own writing; ``tiny_corpus.py`` draws from it."""

import random
import re

# A rule is a list of alternatives separated by "|"; {name} expands a rule. "+" praises, "-" blames.
GRAMMAR = {
    "sentence": "{s+}|{s-}|{s+}|{s-}|{s0}",
    "film": "film|film|film|movie|movie|story|picture",
    "start": "The {film}|The {film}|The {film}|The {film}|This {film}|It",
    "part": (
        "acting|story|script|plot|music|ending|dialogue|camera work|editing|cast|first half|second half|"
        "last scene|humor|love story"
    ),
    "someone": (
        "my sister|my brother|my wife|my husband|my mother|my friend|the woman next to me|"
        "the whole audience|everyone|the man behind me"
    ),
    "degree": "very |really |quite |truly |so |rather |||||",
    "s+": (
        "{start} was {deg_adj+}.|{start} was {adj+} and {adj+}.|{start} was {adj+} and {part_was+}.|"
        "{start} was {adj+}, and {result+}.|{start} was so {adj+} that {result+}.|{start} was {thing+}.|"
        "{start} has {asset+} and {asset+}.|The {part} was {deg_adj+}.|"
        "The {part} was {adj+} and {part_was+}.|I {like+} the {part} and {part_was+}.|"
        "I {like+} this {film} because {part_was+}.|"
        "{start} was {adj+} from the first minute to the last.|{start} made me {feel+}, and {result+}.|"
        "{start} was {thing+} with {asset+}.|{start} was long, but {part_was+}.|"
        "{start} was {deg_adj+}. {Verdict+}.|{start} was {thing+}. {Verdict+}.|{Verdict+}."
    ),
    "s-": (
        "{start} was {deg_adj-}.|{start} was {adj-} and {adj-}.|{start} was {adj-} and {part_was-}.|"
        "{start} was {adj-}, and {result-}.|{start} was so {adj-} that {result-}.|{start} was {thing-}.|"
        "{start} has {asset-} and {asset-}.|The {part} was {deg_adj-}.|"
        "The {part} was {adj-} and {part_was-}.|I {like-} the {part} and {part_was-}.|"
        "I {like-} this {film} because {part_was-}.|"
        "{start} was {adj-} from the first minute to the last.|{start} made me {feel-}, and {result-}.|"
        "{start} was {thing-} with {asset-}.|{start} was too long and {part_was-}.|"
        "{start} was {deg_adj-}. {Verdict-}.|{start} was {thing-}. {Verdict-}.|{Verdict-}."
    ),
    "s0": (
        "{start} was {adj+}, but {part_was-}.|{start} was {adj-}, but {part_was+}.|"
        "I {like+} the {part}, but {part_was-}.|I {like-} the {part}, but {part_was+}.|"
        "{start} was {adj0} and {adj0}.|{start} was {adj0}, but {part_was+}.|"
        "{start} was {adj0}, and {part_was-}.|"
        "{start} was {adj0}, and {someone} wanted to talk about it afterwards.|"
        "{start} was about {topic}.|{start} was about {topic}, and {result+}.|"
        "{start} was about {topic}, but {result-}.|{start} was {adj0} at first and {adj+} at the end.|"
        "{start} was {adj+} at first and {adj-} at the end."
    ),
    "part_was+": "the {part} was {deg_adj+}|the {part} was {adj+}",
    "part_was-": "the {part} was {deg_adj-}|the {part} was {adj-}",
    "deg_adj+": "{degree}{adj+}",
    "deg_adj-": "{degree}{adj-}",
    "adj+": (
        "good|great|funny|beautiful|clever|warm|brilliant|charming|wonderful|exciting|touching|honest|"
        "lovely|strong|fresh|smart|sweet|elegant|moving|gripping|excellent|superb|powerful|delightful|"
        "fascinating|tender|amazing|joyful|thoughtful|perfect"
    ),
    "adj-": (
        "bad|boring|dull|stupid|awful|terrible|sad|weak|ugly|silly|horrible|painful|annoying|lazy|poor|"
        "cruel|empty|dreadful|miserable|confusing|disappointing|tedious|pathetic|predictable|ridiculous|"
        "depressing|cheap|violent|fake|cold"
    ),
    "adj0": (
        "long|short|slow|quiet|strange|odd|simple|dark|loud|ordinary|old-fashioned|serious|familiar|"
        "different|complicated"
    ),
    "like+": "loved|liked|enjoyed|admired|adored",
    "like-": "hated|disliked|could not stand|was angry about|was disappointed by",
    "feel+": "laugh|smile|happy|laugh and cry|feel young again|believe in love|feel hopeful",
    "feel-": "angry|sad|sick|sleepy|feel stupid|feel nothing but boredom|worry about my money",
    "result+": (
        "I want to see it again|I left with a smile|{someone} loved it|we talked about it all night|"
        "I forgot the time|{someone} laughed out loud|I was happy for days|"
        "I told all my friends about it|nobody wanted to go home|I cried happy tears|"
        "{someone} enjoyed every minute"
    ),
    "result-": (
        "I fell asleep|I left before the end|{someone} hated it|we argued all the way home|"
        "I wanted my money back|{someone} walked out|I was angry for days|I warned all my friends|"
        "nobody clapped|I got a headache|{someone} was bored to death|I lost interest"
    ),
    "thing+": (
        "a joy|a delight|a pleasure to watch|a small masterpiece|a great success|a wonderful surprise|"
        "the best of the year|a treat for the whole family"
    ),
    "thing-": (
        "a mess|a disaster|a waste of time|a terrible bore|a great disappointment|a bad joke|"
        "the worst of the year|an insult to the audience"
    ),
    "asset+": (
        "a great cast|a clever script|a big heart|wonderful music|real charm|a lovely ending|good jokes|"
        "beautiful pictures|a brilliant hero"
    ),
    "asset-": (
        "a terrible cast|a stupid script|no heart|awful music|no charm|a horrible ending|bad jokes|"
        "ugly pictures|an annoying hero"
    ),
    "Verdict+": (
        "I loved it|I would gladly see it again|I recommend it to everyone|Do not miss it|"
        "{Someone} loved it too|It is one of my favorites"
    ),
    "Verdict-": (
        "I hated it|I will never watch it again|I warn everyone against it|Stay away from it|"
        "{Someone} hated it too|It is one of the worst"
    ),
    "Someone": "My sister|My brother|My wife|My husband|My mother|My friend|My son|My daughter",
    "topic": (
        "a boy and his dog|a woman who returns home|two brothers at war|a teacher in a small town|"
        "a family on a farm|an old man and the sea|a girl who wants to sing|a thief in love|"
        "three friends on the road|a doctor in a poor village|a king who loses his crown"
    ),
}


def grammar_sentence(rng: random.Random, rule: str = "sentence") -> str:
    """A random expansion of ``rule``."""
    chosen = rng.choice(GRAMMAR[rule].split("|"))
    return re.sub(r"\{([^}]+)\}", lambda match: grammar_sentence(rng, match[1]), chosen)
