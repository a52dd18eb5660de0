"""The walkthrough's means: a function's source, a picture, a hand calculation, an
equation's tests against a reader's function, its two opening pictures, and the toy's scoreboard."""
import contextlib, inspect, io, json, sys, warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from IPython.display import Image, Markdown, display
from PIL import Image as Pixels

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import test_moto
import toy

warnings.filterwarnings("ignore")
matplotlib.rcParams.update({
    "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "image.interpolation": "nearest"})
torch.manual_seed(0)
torch.set_num_threads(1)                        # small networks: threads only wait for each other


def show(thing):
    """The source of a function or class of moto.py, as it is in the file now."""
    display(Markdown(f"```python\n{inspect.getsource(thing)}```"))


def picture(alt):
    """The figure just drawn, as a PNG of 256 colours (less than half the size); `alt` is what those
    read who cannot see it."""
    drawn, small = io.BytesIO(), io.BytesIO()
    plt.savefig(drawn)
    plt.close()
    colours = Pixels.open(drawn).convert("RGB").quantize(256, dither=Pixels.Dither.NONE)
    colours.save(small, "png", optimize=True)
    display(Image(small.getvalue(), alt=alt))


def match(name, ours, expected, tolerance=1e-5):
    """Ours against what a calculation by hand expects; stops the notebook where they differ."""
    ours, expected = (np.round(np.asarray(torch.as_tensor(value).detach(), float), 5)
                      for value in (ours, expected))
    same = ours.shape == expected.shape and np.allclose(ours, expected, atol=tolerance)
    print(f"{name:38} ours {ours.tolist()}   expected {expected.tolist()}   "
          f"{'match' if same else 'DIFFERENT'}")
    assert same


def check(name, function, tests):
    """What the tests named `tests` say when moto.<name> is replaced by `function`."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()), \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_moto.moto, name, function)       # the tests read moto.py for themselves
        pytest.main(["-q", "--tb=no", "--color=no", "-p", "no:cacheprovider", "-W", "ignore",
                     "-k", tests, str(ROOT / "test_moto.py")])
    print(*[line.split(" in ")[0] for line in said.getvalue().splitlines()      # without seconds
            if line.startswith("FAILED") or "passed" in line or "failed" in line], sep="\n")


def strip(axis, images, title="", every=1):
    """Images (T, P, P, 3) side by side."""
    axis.imshow(np.concatenate(list(images[::every]), 1))
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, loc="left", fontsize=9)
    for side in axis.spines.values():
        side.set_visible(False)


def still():
    """A frame of each half of README's GIF."""
    gif = Pixels.open(ROOT / "experiments/figures/agents.gif")
    _, axes = plt.subplots(1, 4, figsize=(13, 3.7))
    for part, (axis, frame) in enumerate(zip(axes, (45, 45, 68, 68))):
        gif.seek(frame)
        image = np.asarray(gif.convert("RGB"))[:, 192 * part:192 * (part + 1)]
        strip(axis, [image], ("agent", "its model's prediction")[part % 2])


BOXES = {                                                   # name: x, y, text; by colour
    "#eeeeee": {"x": (0, 2, "images $x_{t-2}, x_{t-1}, x_t$"),
                "real": (11.2, -0.9, "real $r$, $a$"), "robot": (11.2, 3, "robot")},
    "#fbe5cf": {"e": (2.7, 2, "feature $e_t$"), "b": (5.4, 3, "behaviour prior $b(a|e)$"),
                "d": (5.4, 2, "actor: correction $d$"), "a": (8.3, 3, "action $b + c\\,d$")},
    "#dce9f7": {"s": (2.7, 0.4, "latent $s_t = (h_t, z_t)$"),
                "out": (2.7, -0.9, "$\\hat x_t, \\hat r_t, \\hat e_t$"),
                "K": (6, 0.4, "$K$ priors: $s_{t+1} \\ldots s_{t+Hk}$"),
                "u": (6, -0.9, "disagreement $u$"),
                "r": (8.8, -0.25, "penalised reward $\\tilde r$")},
    "#dff0d8": {"y": (11.2, 0.4, "target $y$"), "Q": (11.2, 1.7, "critics $Q(e, d)$")}}
ARROWS = ("x e|e b 13, 15|e d|b a|d a|a robot|e s 1 stop|s out 3|s K 2, 8|e out 3 stop|x out 3"
          "|a K 8|K u 6|u r 7|K r 3|r y 9, 10|y Q 11 stop|Q y 12 stop|Q d 14|real y 10")
BENDS = {"e out": 0.75, "x out": 0.25, "y Q": 0.35, "Q y": 0.35, "Q d": 0.08}


def data_flow():
    """What flows where: BOXES and ARROWS (from, to, equations; "stop": without a gradient)."""
    figure, axis = plt.subplots(figsize=(13, 4.4), layout="none")
    axis.set(position=(0, 0, 1, 1), xlim=(-1.2, 12.4), ylim=(-1.3, 3.4))
    axis.axis("off")
    drawn = {}
    for colour, boxes in BOXES.items():
        look = dict(boxstyle="round,pad=0.4", fc=colour, ec="0.4", lw=0.6)
        for name, (x, y, text) in boxes.items():
            drawn[name] = axis.text(x, y, text, ha="center", va="center", fontsize=10, bbox=look)
    figure.canvas.draw()
    for start, end, *label in (arrow.split(" ", 2) for arrow in ARROWS.split("|")):
        label = "".join(label)
        stopped, bend = label.endswith("stop"), BENDS.get(f"{start} {end}", 0)
        colour = "tab:red" if stopped else "0.25"
        (x0, y0), (x1, y1) = drawn[start].get_position(), drawn[end].get_position()
        axis.annotate("", (x1, y1), (x0, y0), arrowprops=dict(
            arrowstyle="-|>", fc="k", color=colour, ls="--" if stopped else "-",
            connectionstyle=f"arc3,rad={bend}", patchA=drawn[start].get_bbox_patch(),
            patchB=drawn[end].get_bbox_patch()))
        axis.text((x0 + x1) / 2 + bend * (y1 - y0) / 2 + 0.12 * (x0 == x1),
                  (y0 + y1) / 2 - bend * (x1 - x0) / 2 + 0.08, label.removesuffix(" stop"),
                  fontsize=9, color=colour, ha="left" if x0 == x1 else "center", va="bottom")


def timeline():
    """What learns when."""
    _, axis = plt.subplots(figsize=(13, 1.9))
    right = dict(ha="right", va="center")
    for row, (name, start, end, colour) in enumerate((
            ("encoder of $e$, behaviour prior", 0, 4, "#f4b183"),
            ("world model, critics", 0, 13, "#9dc3e6"), ("actor", 8, 13, "#a9d18e"))):
        axis.text(-0.15, -row, name, **right)
        axis.barh(-row, end - start, left=start, height=0.55, color=colour)
    axis.text(2, 0.6, "offline: $N$ updates on the demonstrations", ha="center")
    axis.text(8.5, 0.6, "online: an episode, then $U$ updates on old and new data; again",
              ha="center")
    for n in range(9):
        colour = "tab:blue" if n % 2 == 0 else "white"
        axis.plot(4.3 + n, -3, marker="o", color=colour, mec="tab:blue", ms=8)
    axis.text(-0.15, -3, "episodes (filled: with noise)", **right)
    axis.text(7.9, -2, "after ten misses:", fontsize=8, **right)
    axis.axvline(4, color="0.3", lw=1)
    axis.set(xlim=(-2.6, 13.2), ylim=(-3.4, 1))
    axis.axis("off")


def draw_ways(axis, episodes, title):
    """The ways of the toy's blob in `episodes`, and their mean return."""
    for episode in episodes:
        axis.plot(*toy.where(episode["image"]), lw=1, marker=".", ms=4)
    disk = matplotlib.patches.Circle((0, 0), toy.RADIUS, fill=False, color="tab:green", lw=2)
    axis.add_patch(disk)
    mean = np.mean([toy.infinite_return(episode["reward"]) for episode in episodes])
    axis.set(title=f"{title}\nreturn {mean:.2f}", xlim=(-1.1, 1.1), ylim=(1.1, -1.1),
             aspect="equal", xticks=[], yticks=[])


def scoreboard(*names):
    """A row for each named agent of toy.AGENTS, from the recorded file: returns and promises."""
    recorded = json.loads(toy.FILE.read_text())
    _, axis = plt.subplots(figsize=(9, 0.6 + 0.36 * len(names)))
    for row, name in enumerate(names):
        seeds = recorded[name].values()
        column = lambda key: np.array([seed[key] for seed in seeds if key in seed])
        for side, colour, shift in (("left", "tab:red", 0.14), ("right", "tab:blue", -0.14)):
            y, online = row + shift, column(f"online_{side}")
            axis.plot(online, np.full(len(online), y), ".", ms=4, color=colour, alpha=0.6)
            axis.plot(online.mean(), y, "o", ms=7, color=colour)
            axis.plot(column(f"offline_{side}").mean(), y, "o", ms=7, mfc="none", mec=colour)
            if len(promised := column(f"promised_{side}")):
                axis.plot(promised.mean(), y, "x", ms=6, color=colour)
        every = column("online")
        print(f"{name:28} left {column('online_left').mean():.2f}   right "
              f"{column('online_right').mean():.2f}   all {every.mean():.2f} "
              f"({every.min():.2f} to {every.max():.2f})")
    axis.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5),
             xlim=(-0.6, 0.9), xlabel="return (x: promised)")
    axis.grid(axis="y", lw=0.3)
