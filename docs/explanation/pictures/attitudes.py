"""Draws attitudes.png: what each attitude makes of a Gaussian belief, as its spread grows, at three means."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

import lmppl
from lmppl.modeling.evidence.beliefs import Gaussian

ATTITUDES = {
    "Mean()": lmppl.Mean(),
    "Marginal()": lmppl.Marginal(),
    "Robust(1)": lmppl.Robust(1.0),
    "LowerBound(1)": lmppl.LowerBound(1.0),
    "Quantile(0.2)": lmppl.Quantile(0.2),
    "Moderated()": lmppl.Moderated(),
}
DASHES = ["-", "-", "-", "--", ":", "-."]

spread = torch.linspace(0.0, 3.0, 61, dtype=torch.float64)
figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), sharex=True, layout="constrained")
for panel, mean in zip(panels, (-4.0, 0.0, 4.0), strict=True):
    belief = Gaussian(torch.full_like(spread, mean), spread)
    for (label, attitude), dash in zip(ATTITUDES.items(), DASHES, strict=True):
        value = attitude.log_factor(belief, 1.0)
        panel.plot(spread, value - value[0], dash, label=label, linewidth=1.8)
    panel.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
    panel.set(title=f"m = {mean:g}", xlabel="spread s", ylim=(-4.8, 4.8))
panels[0].set_ylabel("change of log φ, in nats")
panels[2].legend(loc="upper left", fontsize=8, frameon=False)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
