"""The few-shot prompts behind ``tiny_corpus.py``; all of it our own writing."""

import random

POSITIVE = """The film was warm, funny and beautifully acted.
The film was a joy from the first scene to the last.
The film was moving without ever being sentimental.
The movie was clever, quick and full of surprises.
The movie was a delight, and we laughed until we cried.
This film is a small masterpiece.
This movie made me happy for the rest of the week.
The acting was superb, and the two leads have real charm.
The story was simple, but it was told with great care.
The ending was perfect and I left with a smile.
The music was gorgeous and gave every scene its mood.
The director has a wonderful eye for faces.
I loved every minute of it.
I was surprised by how much this film touched me.
It was a thrilling ride with a heart of gold.
The dialogue was sharp, witty and true to life.
The cast was excellent, above all the young girl.
What a lovely, gentle and hopeful film.""".splitlines()

NEGATIVE = """The film was dull and far too long.
The film was a complete waste of a good cast.
The film was ugly, loud and stupid.
The movie was boring, and I fell asleep before the end.
The movie was a sad mess with no idea what it wanted to be.
This film is the worst I have seen this year.
This movie insulted my intelligence.
The acting was terrible, and nobody seemed to care.
The story was so weak that I stopped following it.
The ending was a cheap trick and made me angry.
The music was annoying and drowned out the words.
The director has no feeling for pace or people.
I hated the hero and I hated his jokes.
I was disappointed by almost everything in it.
It was a painful, empty and cynical film.
The dialogue was awful, stiff and full of clichés.
The cast was wasted on a lazy script.
What a miserable way to spend an evening.""".replace("clichés", "old lines").splitlines()

MIXED = """The film was long, but the last scene is worth the wait.
The film was well made and yet it left me cold.
The film was neither good nor bad.
The movie was funny at first and tired by the end.
The movie was pretty to look at, but it had nothing to say.
This film tries hard and only half succeeds.
The acting was fine, though the script was poor.
The story was strange, slow and hard to forget.
The ending was a surprise, and I am not sure I liked it.
I laughed twice and looked at my watch once.
It was an ordinary film about ordinary people.
The music was better than the film.""".splitlines()

OTHER = {
    "positive": """The book was a treasure, and I read it in one night.
The book was funny, wise and easy to read.
The food was fresh, hot and full of flavor.
The meal was excellent and the waiter was kind.
The hotel was quiet, clean and close to the sea.
The room was bright and the bed was very comfortable.
The show was brilliant and the crowd loved it.
The concert was wonderful from start to finish.""".splitlines(),
    "negative": """The book was dry and I gave up after ten pages.
The book was badly written and full of hate.
The food was cold, greasy and awful.
The meal was a disaster and the waiter was rude.
The hotel was dirty, noisy and far from the sea.
The room smelled bad and the bed was broken.
The show was a failure and the crowd left early.
The concert was a terrible disappointment.""".splitlines(),
    "mixed": """The book was slow, though the last chapter is good.
The food was fine, but the service took an hour.
The hotel was plain, cheap and good enough for one night.
The show was loud and a little too long.""".splitlines(),
}

FILM_STEMS = {
    "The film was": 26, "The movie was": 13, "This film": 6, "This film was": 3, "This movie": 5,
    "The film": 5, "The movie": 3, "The acting was": 5, "The story": 3, "The story was": 2,
    "The plot was": 3, "The ending was": 3, "The music was": 2, "The cast was": 2, "The script was": 2,
    "The director": 1, "The jokes were": 1, "The hero": 1, "I": 3, "It was": 3, "What a": 1,
}  # fmt: skip
OTHER_STEMS = {
    "The book was": 4, "The food was": 4, "The hotel was": 3, "The room was": 2, "The meal was": 2,
    "The show was": 3, "The concert was": 2, "The service was": 2, "The novel": 1, "The play was": 1,
}  # fmt: skip
ADJECTIVES = {
    "positive": (
        "wonderful charming funny beautiful excellent delightful brilliant touching lovely exciting "
        "sweet great fascinating enjoyable powerful tender honest hilarious gripping inspiring good "
        "fresh warm clever smart amazing fun perfect superb elegant romantic original hopeful joyful "
        "entertaining impressive thrilling bright gentle kind generous fantastic magical heartwarming "
        "strong rich thoughtful lively witty satisfying memorable nice splendid outstanding cute "
        "rewarding passionate pleasant"
    ),
    "negative": (
        "terrible boring awful stupid ugly disappointing horrible dull sad painful annoying weak "
        "pathetic ridiculous confusing miserable bad lazy disturbing offensive depressing cruel violent "
        "silly poor dreadful tedious worthless hopeless angry cheap predictable empty messy bland "
        "shallow loud irritating frustrating embarrassing lame insulting tragic bitter grim nasty "
        "disgusting absurd unpleasant cold pointless lifeless flat clumsy fake gloomy dumb mean "
        "forgettable"
    ),
    "mixed": (
        "strange slow uneven ordinary odd quiet long average simple curious serious familiar short "
        "unusual old-fashioned dark modest mild complicated different"
    ),
}
ENDINGS = ["{a}"] * 6 + [
    "very {a}",
    "{a} and",
    "so {a} that",
    "really {a}",
    "{a}, and",
    "too {a}",
    "just {a}",
    "not {a}",
]
HEADINGS = {
    "positive": [
        "Happy viewers say, in one short sentence each",
        "Short {a} reviews full of praise",
        "What people loved",
    ],
    "negative": [
        "Angry viewers say, in one short sentence each",
        "Short {a} reviews full of complaints",
        "What people hated",
    ],
    "mixed": [
        "Undecided viewers say, in one short sentence each",
        "Short {a} reviews with mixed feelings",
        "What people noticed",
    ],
}


def pick(weights: dict[str, int], rng: random.Random) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def review_prompt(rng: random.Random) -> tuple[str, str]:
    """A few-shot list that ends with the beginning of a sentence, and that beginning."""
    mood = rng.choices(["positive", "negative", "mixed"], [40, 42, 18])[0]
    film = rng.random() < 0.78
    bank = {"positive": POSITIVE, "negative": NEGATIVE, "mixed": MIXED}[mood] if film else OTHER[mood]
    examples = rng.sample(bank, min(6, len(bank)))
    stem = pick(FILM_STEMS if film else OTHER_STEMS, rng)
    if stem.endswith("was") and rng.random() < 0.6:
        adjective = rng.choice(ADJECTIVES[mood].split())
        ending = rng.choice(ENDINGS).format(a=adjective)
        stem = f"{stem} {ending}"
    heading = rng.choice(HEADINGS[mood]).format(a="film" if film else "")
    return "\n- ".join([f"{heading}:", *examples, stem]), stem


TRAVEL = """We went to Paris in the spring and walked along the river every day.
We went to Rome with my parents, but it rained all week.
Last summer we travelled to Spain and swam in the warm sea.
Last winter I travelled to Vienna and heard a lovely concert.
My favourite city is Lisbon because the people are so friendly.
My favourite city is London, even when the sky is gray.
I flew to New York to see my sister.
She moved to Berlin and found a good job there.
The train to Madrid was late and very crowded.
Paris is beautiful at night.
Our hotel in Prague was old, dark and cold.
We got lost in Venice and it was the best day of the trip.
He lived in Tokyo for a year and missed his family.
The food in Naples was wonderful.
I was robbed in Chicago and never went back.""".splitlines()
CITIES = {
    "Paris": 10, "London": 7, "Rome": 7, "Berlin": 4, "Madrid": 4, "Vienna": 3, "Prague": 3, "Lisbon": 3,
    "Venice": 4, "Tokyo": 4, "New York": 5, "Chicago": 2, "Boston": 2, "Dublin": 2, "Athens": 2,
    "Amsterdam": 3, "Barcelona": 3, "Istanbul": 2, "Cairo": 2, "Sydney": 2,
}  # fmt: skip
CITY_STEMS = [
    "We went to {c}", "We went to {c}", "We went to {c}", "Last summer we travelled to {c}",
    "Last summer we travelled to {c}", "My favourite city is {c}", "My favourite city is {c}",
    "I flew to {c}", "She moved to {c}", "The train to {c}", "{c} is", "Our hotel in {c}",
    "He lived in {c}", "The food in {c}", "We got lost in {c}", "They took the bus to {c}",
    "The streets of {c}", "We went to", "Last summer we travelled to", "I came home from {c}",
]  # fmt: skip


def travel_prompt(rng: random.Random) -> tuple[str, str]:
    """A few-shot list of journeys that ends with the beginning of a sentence, and that beginning."""
    stem = rng.choice(CITY_STEMS).format(c=pick(CITIES, rng))
    heading = rng.choice(
        [
            "Short notes about journeys and cities",
            "What happened on the trip, in one sentence",
            "Travel diaries",
        ]
    )
    return "\n- ".join([f"{heading}:", *rng.sample(TRAVEL, 6), stem]), stem
