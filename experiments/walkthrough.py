"""The walkthrough's means: a function's source, a picture, a hand calculation, an equation's tests
against a reader's function; what it prepares, and what it draws, in the notebook's order.

Axes and letters as in moto.py. Functions named draw_* leave a figure, which `picture` shows."""
import contextlib, inspect, io, json, re, sys, warnings
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
import demonstrations
import moto
import pictures
import reproduce
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


def picture(alt, figure=None):
    """A figure, by default the one just drawn, as a PNG of 256 colours (a third of the size);
    `alt` is what those read who cannot see it."""
    drawn, small = io.BytesIO(), io.BytesIO()
    (figure or plt).savefig(drawn)
    plt.close()
    colours = Pixels.open(drawn).convert("RGB").quantize(
        256, method=Pixels.Quantize.FASTOCTREE, dither=Pixels.Dither.NONE)
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
    print(*[re.sub(r"(, \d+ deselected)? in [\d.]+s.*", "", line)
            for line in said.getvalue().splitlines()
            if line.startswith("FAILED") or "passed" in line or "failed" in line], sep="\n")


# ---- What the notebook prepares ------------------------------------------------------------------

def recorded(agent, *names):
    """Print these numbers of the result.json of an agent of experiments/agents."""
    result = json.loads((ROOT / "experiments/agents" / agent / "result.json").read_text())
    print({name: result[name] for name in names})


def demonstrate(run, seed):
    """A scripted demonstration in a run's environment, as a dict like moto.rollout's."""
    shown = demonstrations.demonstrate(run.cfg, run.env, seed)
    episode = dict(zip(("image", "action", "reward", "success"), shown))
    return episode | {"action": [np.float32(action) for action in episode["action"]]}


def play(env, actions, seed):
    """The episode in which `actions` (T, A) are executed, as a dict like moto.rollout's."""
    images, rewards = [env.reset(seed)], []
    for action in actions:
        image, reward, *_ = env.step(action)
        images.append(image), rewards.append(reward)
    return {"image": images, "action": list(actions), "reward": rewards, "success": any(rewards)}


def random_walk(steps, size):
    """Actions (steps, size): a random walk, clipped to [-1, 1]."""
    noise = 0.5 * np.random.default_rng(0).standard_normal((steps, size))
    return np.clip(np.cumsum(noise, 0), -1, 1).astype(np.float32)


@torch.no_grad()
def watch(agent, episode):
    """An episode as the agent sees it: state h (T, D), z (T, S), and feature e (T, E)."""
    e, a, first = pictures.as_sequence(agent, episode)
    h, z, *_ = (value[0] for value in agent.model.observe(e, a, first))
    return h, z, e[0]


def state_at(agent, episode, step):
    """The state h (1, D), z (1, S) after the images up to this step of an episode."""
    begun = {"image": episode["image"][:step + 1], "action": episode["action"][:step]}
    h, z, _ = watch(agent, begun)
    return h[-1:], z[-1:]


@torch.no_grad()
def doubt(agent, episode):
    """Disagreement u along a filtered episode, from step 1 on, in units of its mean on the data."""
    h, *_ = watch(agent, episode)
    means, _ = agent.model.prior(h)
    return (moto.disagreement(means) / agent.model.disagreement_mean)[1:].numpy()


def grey_batch(cfg, B=2, T=5, A=2):
    """A batch for moto.model_loss: images of 0.1 everywhere, features of 0.5, random actions."""
    g = torch.Generator().manual_seed(0)
    return {"x": torch.full((B, T, 3, cfg.image_size, cfg.image_size), 0.1),
            "a": torch.rand(B, T, A, generator=g), "e": torch.full((B, T, cfg.hidden), 0.5),
            "r": torch.randint(2, (B, T), generator=g).float(), "is_terminal": torch.zeros(B, T),
            "is_first": (torch.arange(T) == 0).expand(B, T)}


def silence(model):
    """Set the last layers of a WorldModel to zero."""
    for net in (model.decoder.convolutions, model.feature, model.reward, model.posterior_net):
        torch.nn.init.zeros_(net[-1].weight), torch.nn.init.zeros_(net[-1].bias)
    torch.nn.init.zeros_(model.priors.weights[-1])       # the bias of the heads begins at zero


def returns_to_go(rewards, gamma):
    """(1 - gamma) times the return from each of T + 1 images on; the last of T rewards goes on for
    ever, as the critics assume."""
    G = np.append(np.zeros(len(rewards)), rewards[-1] / (1 - gamma))
    for t in reversed(range(len(rewards))):
        G[t] = rewards[t] + gamma * G[t + 1]
    return (1 - gamma) * G


def until_success(agent, episodes):
    """Of each episode up to ten steps after success, as far as the data goes: what `watch` says,
    and the true returns (T,)."""
    seen, truths = [watch(agent, episode) for episode in episodes], []
    for n, episode in enumerate(episodes):
        stop = int(np.argmax(episode["reward"])) + 11 if episode["success"] else None
        seen[n] = [value[:stop] for value in seen[n]]
        truths.append(returns_to_go(episode["reward"], agent.cfg.gamma)[:stop])
    return seen, truths


@torch.no_grad()
def expansions(agent, seen, H, draws=8):
    """(1 - gamma) times the value (T,) of each step of an episode after H imagined decisions, mean
    of `draws` dreams: with the trained critics, and with critics that say 0."""
    cfg, policy, N = agent.cfg, agent.ema_policy, draws * len(seen[0])
    start = (value.repeat(draws, 1) for value in seen)
    dream = moto.imagine(agent.model, policy, policy.actor, *start, H, cfg.hold)
    reward = agent.model.expected_reward(dream["feat"][1:])     # no penalty: this asks for truth
    reward = reward.reshape(H, cfg.hold, N).movedim(1, -1)
    steps = moto.accumulate(reward, torch.full_like(reward, cfg.gamma))
    q = agent.target(dream["e"], dream["d"]).mean(0)
    V = [moto.value_expansion(*steps, critic, lam=1.0)[0] for critic in (q, torch.zeros_like(q))]
    return [(1 - cfg.gamma) * v.reshape(draws, -1).mean(0).numpy() for v in V]


@torch.no_grad()
def dream(run, seen, count):
    """`count` dreams of a run's policy from the first state of an episode (as of `watch`), as long
    as an episode -> rewards (T, count), images of the most rewarded one, and its number."""
    model, policy, hold = run.agent.model, run.agent.ema_policy, run.cfg.hold
    start = (value[:1].repeat(count, 1) for value in seen)
    H = run.cfg.episode_steps // hold
    feat = moto.imagine(model, policy, policy.actor, *start, H, hold)["feat"]
    reward = model.expected_reward(feat)
    best = int(reward.amax(0).argmax())
    return reward, moto.to_uint8(model.decoder(feat[:, best])), best


def random_mdp(seed, X=12, A=3, gamma=0.9, samples=150, members=5):
    """A random Markov decision process and an ensemble of `members` tables, each estimated from a
    bootstrap sample of what a demonstrator did -> dict of P, P_hat (X, A, X), r, u, pi (the
    demonstrator), visits (X, A), start (X,), gamma. u: the largest distance of two members."""
    g = np.random.default_rng(seed)
    P, r = g.dirichlet(0.3 * np.ones(X), (X, A)), g.random((X, A)) * (g.random((X, A)) < 0.4)
    pi = 0.9 * moto.tabular_optimum(P, r, gamma, 200) + 0.1 / A
    s, seen, visits = 0, [], np.zeros((X, A), int)
    for _ in range(samples):
        action = g.choice(A, p=pi[s])
        following = g.choice(X, p=P[s, action])
        seen.append((s, action, following))
        visits[s, action] += 1
        s = following
    tables = []
    for _ in range(members):
        counts = 0.3 * g.dirichlet(0.3 * np.ones(X), (X, A))        # each member's own start
        for i in g.integers(len(seen), size=len(seen)):
            counts[seen[i]] += 1
        tables.append(counts / counts.sum(-1, keepdims=True))
    tables = np.stack(tables)
    u = np.abs(tables[:, None] - tables[None]).sum(-1).max((0, 1))
    return {"P": P, "P_hat": tables.mean(0), "r": r, "u": u, "pi": pi, "visits": visits,
            "start": np.eye(X)[0], "gamma": gamma}


def practised(folder):
    """The runs in a folder whose task has one with an online phase, as of reproduce.grouped."""
    runs = reproduce.read_runs(sorted(Path(folder).glob("*-seed*/")))
    return {task: groups for task, groups in reproduce.grouped(runs).items()
            if any(len(rows) > 1 for members in groups.values() for _, rows in members)}


def open_kitchen():
    """The agent of Franka Kitchen; None, and the reason printed, where it cannot be opened."""
    try:
        return moto.open_run(ROOT / "experiments/agents/kitchen-partial")
    except moto.UserError as reason:         # the extra is missing, or it is of another version
        print(reason)


# ---- What it draws -------------------------------------------------------------------------------

def strip(axis, images, title="", when=None):
    """Images (T, P, P, 3) side by side; with their steps `when` (T,), evenly spaced, each in the
    middle of its step on the x axis."""
    shape = dict(aspect="equal")
    if when is not None:
        half = (when[-1] - when[0]) / (len(when) - 1) / 2
        shape = dict(aspect="auto", extent=(when[0] - half, when[-1] + half, 0, 1))
    axis.imshow(np.concatenate(list(images), 1), **shape)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, loc="left", fontsize=9)
    for side in axis.spines.values():
        side.set_visible(False)


def still():
    """A frame of each half of README's GIF."""
    gif = Pixels.open(ROOT / "experiments/figures/agents.gif")
    _, axes = plt.subplots(1, 4, figsize=(13, 3.7))
    for part, (axis, frame) in enumerate(zip(axes, (68, 68, 68, 68))):
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
                "K": (6, 0.4, "$K$ heads: $s_{t+1} \\ldots s_{t+Hk}$"),
                "u": (6, -0.9, "disagreement $u$"),
                "r": (8.8, -0.25, "penalised reward $\\tilde r$")},
    "#dff0d8": {"y": (11.2, 0.4, "target $y$"), "Q": (11.2, 1.7, "critics $Q(e, d)$")}}
ARROWS = ("x e 13|e b 13, 15|e d stop|b a stop|d a stop|a robot stop|e s 1 stop|s out 3|s K 2"
          "|e out 3 stop|x out 3 stop|a K 8 stop|K d stop|K u 6 stop|u r 7 stop|K r 3 stop"
          "|r y 9, 10 stop|y Q 11 stop|Q y 12 stop|d Q 14|e Q stop|real y 10 stop"
          "|real Q 10 stop")
BENDS = {"e out": 0.75, "x out": 0.25, "y Q": 0.35, "Q y": 0.35, "d Q": -0.08, "e Q": 0.16,
         "K d": -0.3, "real Q": 0.75}


def data_flow():
    """What flows where: BOXES and ARROWS (from, to, equations; "stop": no gradient flows back)."""
    figure, axis = plt.subplots(figsize=(13, 4.4), layout="none")
    axis.set(position=(0, 0, 1, 1), xlim=(-1.2, 12.7), ylim=(-1.3, 3.4))
    axis.axis("off")
    drawn = {}
    for colour, boxes in BOXES.items():
        look = dict(boxstyle="round,pad=0.4", fc=colour, ec="0.4", lw=0.6)
        for name, (x, y, text) in boxes.items():
            drawn[name] = axis.text(x, y, text, ha="center", va="center", fontsize=10, bbox=look)
    figure.canvas.draw()
    for start, end, *label in (arrow.split(" ", 2) for arrow in ARROWS.split("|")):
        label, bend = "".join(label), BENDS.get(f"{start} {end}", 0)
        stopped = label.endswith("stop")
        colour = "0.45" if stopped else "k"
        (x0, y0), (x1, y1) = drawn[start].get_position(), drawn[end].get_position()
        axis.annotate("", (x1, y1), (x0, y0), arrowprops=dict(
            arrowstyle="-|>", fc="k", color=colour, ls="--" if stopped else "-",
            connectionstyle=f"arc3,rad={bend}", patchA=drawn[start].get_bbox_patch(),
            patchB=drawn[end].get_bbox_patch()))
        steep = abs(x1 - x0) < 1
        axis.text((x0 + x1) / 2 + bend * (y1 - y0) / 2 + 0.12 * steep,
                  (y0 + y1) / 2 - bend * (x1 - x0) / 2 + 0.08,
                  label.removesuffix("stop").strip(), fontsize=9, color=colour,
                  ha="left" if steep else "center", va="bottom")


def timeline():
    """What learns when."""
    _, axis = plt.subplots(figsize=(13, 2.2))
    right = dict(ha="right", va="center")
    for row, (name, start, end, colour) in enumerate((
            ("encoder of $e$, behaviour prior", 0, 2, "#f4b183"),
            ("world model", 2, 13, "#9dc3e6"), ("critics", 2, 13, "#a9d18e"),
            ("actor", 8, 13, "#f4b183"))):
        axis.text(-0.15, -row, name, **right)
        axis.barh(-row, end - start, left=start, height=0.55, color=colour)
    axis.text(2, 0.6, "offline, on the demonstrations:\n$N$ updates, and $N$ more", ha="center")
    axis.text(8.5, 0.6, "online: an episode, then $U$ updates on old and new data; again",
              ha="center")
    for n in range(9):
        colour = "tab:blue" if n % 2 == 0 else "white"
        axis.plot(4.3 + n, -4, marker="o", color=colour, mec="tab:blue", ms=8)
    axis.text(-0.15, -4, "episodes (filled: with noise)", **right)
    axis.text(7.9, -3, "after ten failures:", fontsize=8, **right)
    axis.axvline(4, color="0.3", lw=1)
    axis.set(xlim=(-2.6, 13.2), ylim=(-4.4, 1))
    axis.axis("off")


def film(axis, images, name, end=None, count=12, below=None):
    """`count` images from the first to that of step `end` (None: the last), named with their
    steps; `below`: the axis of steps under which they stand."""
    last = len(images) - 1
    when = np.linspace(0, last if end is None else end, count).astype(int).clip(0, last)
    title = f"{name}: steps {', '.join(map(str, when))}"
    strip(axis, np.stack(images)[when], title, None if below is None else when)
    if below is not None:
        below.set_xlim(axis.get_xlim())


def draw_episodes(episodes):
    """A strip for each of {name: [episodes]}, to shortly after success (a failure: to the end)."""
    rows = [(name, one) for name, group in episodes.items() for one in group]
    _, axes = plt.subplots(len(rows), 1, figsize=(13, 1.2 * len(rows) + 0.1))
    for axis, (name, one) in zip(axes, rows):
        film(axis, one["image"], name, np.argmax(one["reward"]) + 5 if max(one["reward"]) else None)


def draw_time():
    """The numbering of images, actions and rewards."""
    _, axis = plt.subplots(figsize=(9, 1.5))
    box = dict(boxstyle="round", fc="#dce9f7", ec="none")
    for t in range(4):
        axis.text(2 * t, 0, f"$x_{t}$", fontsize=15, ha="center", va="center", bbox=box)
        if t:
            axis.annotate("", (2 * t - 0.3, 0), (2 * t - 1.7, 0), arrowprops=dict(arrowstyle="->"))
            axis.text(2 * t - 1, 0.25, f"$a_{t}$", ha="center")
            axis.text(2 * t, -0.75, f"$r_{t}$", ha="center")
    axis.set(xlim=(-0.6, 6.6), ylim=(-1, 0.7))
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


def draw_cloning(shown, cloned):
    """The images of one of the toy's demonstrations; below, the ways of demonstrators and clone."""
    layout = [["strip", "strip"], ["demos", "clone"]]
    _, axes = plt.subplot_mosaic(layout, figsize=(8, 5), height_ratios=(1, 3.6))
    strip(axes["strip"], np.stack(shown[0]["image"]), "one of twelve demonstrations")
    draw_ways(axes["demos"], shown, "demonstrations")
    draw_ways(axes["clone"], cloned, "cloning")


def draw_both_ways(groups):
    """The ways of the toy's blob side by side: {title: episodes}."""
    _, axes = plt.subplots(1, len(groups), figsize=(4 * len(groups), 3.8))
    for axis, (title, episodes) in zip(axes, groups.items()):
        draw_ways(axis, episodes, title)


def draw_filter(images, decoded, std):
    """True images, those decoded from the filtered state, and the posterior's standard deviations
    (T, S)."""
    figure, axes = plt.subplots(3, 1, figsize=(13, 4.2), height_ratios=[1, 1, 1.3])
    shades = axes[2].imshow(std.T, aspect="auto", cmap="viridis_r", vmin=0.1)
    film(axes[0], images, "what the camera sees", len(std) - 1, below=axes[2])
    film(axes[1], decoded, "decoded from the filtered state", len(std) - 1, below=axes[2])
    axes[2].set(xlabel="step", ylabel="element of z (sorted)",
                title="standard deviation of the posterior")
    figure.colorbar(shades, ax=axes)


def draw_heads(mean_p, mean_q, elements):
    """The heads' means (K, n, S) and the posterior's (n, S) of steps 1 to n, for these elements
    of z."""
    _, axes = plt.subplots(1, len(elements), figsize=(13, 2.3), sharex=True)
    when = range(1, len(mean_q) + 1)
    for axis, element in zip(axes, elements):
        axis.plot(when, mean_p[..., element].T, lw=1, alpha=0.8)
        axis.plot(when, mean_q[:, element], "k--", lw=1)
        axis.set(title=f"element {int(element)}", xlabel="step")
    axes[0].set_ylabel(f"mean of z: posterior dashed,\nK = {len(mean_p)} heads in colour")


def draw_open_loop(real, imagined, true_reward, reward, seen):
    """True and predicted images and rewards, from shortly before the step `seen`, after which the
    model sees actions only; true_reward (T,) of the images, as `reward`."""
    when, t = np.arange(max(seen - 2, 0), len(real), 4), np.arange(max(seen - 4, 0), len(real))
    _, axes = plt.subplots(3, 1, figsize=(13, 4.2), height_ratios=[1, 1, 1.2])
    strip(axes[0], real[when], f"truth, steps {when[0]} to {when[-1]}", when)
    strip(axes[1], imagined[when], "model: after the white line it sees actions only", when)
    for axis in axes[:2]:
        axis.axvline(seen, color="white", lw=3)
    axes[2].plot(t, np.asarray(true_reward)[t], "k", label="true reward")
    axes[2].plot(t, reward[t], "tab:green", label="predicted")
    axes[2].axvline(seen, color="grey", ls=":")
    axes[2].set(xlabel="step", xlim=axes[0].get_xlim(), ylim=(-0.05, 1.1))
    axes[2].legend(loc="center left")


def draw_losses(rows, begin, **scales):
    """Rows of metrics over updates, a panel for each named loss of the model with its scale; a
    dotted line where the online phase begins."""
    _, axes = plt.subplots(1, len(scales), figsize=(13, 2.4))
    for axis, (name, scale) in zip(axes, scales.items()):
        name = f"model/{name}"
        axis.plot(*zip(*[(row["updates"], row[name]) for row in rows if name in row]))
        axis.axvline(begin, color="grey", ls=":")
        axis.set(yscale=scale, title=f"{name} (nats per step)", xlabel="updates")


def draw_balance(balances, steps=60, rate=0.05):
    """Gradient descent on Eq 5 by the means of posterior and prior, for each balance w."""
    _, axes = plt.subplots(1, len(balances), figsize=(13, 2.3), sharey=True)
    one = torch.ones(1, 1)
    for axis, w in zip(axes, balances):
        means, path = [torch.tensor([[2.0]]), torch.tensor([[[-2.0]]])], []
        for _ in range(steps):
            path.append([mean.item() for mean in means])
            q, p = (mean.clone().requires_grad_() for mean in means)
            kl = moto.kl_balanced((q, one), (p, one[None]), w, free_nats=0.0)
            slopes = torch.autograd.grad(kl.sum(), (q, p))
            means = [mean - rate * slope for mean, slope in zip(means, slopes)]
        axis.plot(path, label=["posterior's mean (what it saw)", "prior's mean (what it foresaw)"])
        axis.set(title=f"w = {w}", xlabel="gradient steps")
    axes[0].legend(fontsize=8)


def draw_doubt(filtered, dreamt):
    """Disagreement over steps: two dicts {name: (T,)}, with images and without."""
    _, axes = plt.subplots(1, 2, figsize=(13, 2.6), sharey=True)
    for axis, curves in zip(axes, (filtered, dreamt)):
        for name, u in curves.items():
            axis.plot(range(1, len(u) + 1), u, label=name)
        axis.axhline(1, color="grey", ls=":")
        axis.legend()
    axes[0].set(title="with images (filtered)", xlabel="step",
                ylabel="u (1: its mean on the data)")
    axes[1].set(title="without images (open loop)", xlabel="steps after the third image")


def draw_plans(plans):
    """Plans {alpha: (imagined reward, real reward, disagreement), each (T,)}."""
    _, axes = plt.subplots(1, 3, figsize=(13, 2.6), sharex=True)
    for (alpha, (promised, real, u)), colour in zip(plans.items(), ("tab:red", "tab:blue")):
        for axis, values in zip(axes, (promised, real, u)):
            axis.plot(range(1, len(values) + 1), values, color=colour, label=f"alpha = {alpha:g}")
        print(f"alpha = {alpha:g}: imagined {promised.sum():5.1f} of {len(promised)}, "
              f"real {sum(real):4.1f}, mean disagreement {u.mean():4.1f} times the usual")
    axes[0].set(title="imagined reward", ylim=(-0.05, 1.05), xlabel="step")
    axes[1].set(title="real reward of the same actions", ylim=(-0.05, 1.05), xlabel="step")
    axes[2].set(title="disagreement (1: usual)", xlabel="step")
    axes[0].legend()


@torch.no_grad()
def draw_dreams(model, feat):
    """A strip for each of N dreams, decoded from states (T, N, F), and its predicted rewards."""
    (T, N), reward = feat.shape[:2], model.expected_reward(feat)
    frames = moto.to_uint8(model.decoder(feat.flatten(0, 1)))
    frames = frames.reshape(T, N, *frames.shape[1:])
    _, axes = plt.subplots(N, 1, figsize=(11, 1.2 * N))
    for n, axis in enumerate(axes):
        hopes = ", ".join(f"{value:.1f}" for value in reward[:, n])
        strip(axis, frames[:, n], f"dream {n + 1}: predicted reward {hopes}")


def draw_expansion(agent, seen, truths, horizons):
    """Value expansion from each step of episodes (as of `until_success`): the first one's curves,
    then mean and standard deviation of the error for each horizon, with trained critics and with
    critics that say 0."""
    _, axes = plt.subplots(1, 3, figsize=(13, 2.8), width_ratios=[1.6, 1, 1])
    axes[0].plot(truths[0], "k", lw=2, label="real return")
    for H in horizons:
        estimates = [expansions(agent, one, H) for one in seen]
        axes[0].plot(estimates[0][0], label=f"H = {H}", alpha=0.8)
        for n, axis in enumerate(axes[1:]):
            error = np.concatenate([both[n] - G for both, G in zip(estimates, truths)])
            axis.errorbar(H, error.mean(), error.std(), fmt="o", capsize=4, color="tab:blue")
    for axis, title in zip(axes[1:], ("trained critics", "critics that say 0")):
        axis.axhline(0, color="grey", ls=":")
        axis.set(xticks=horizons, xlabel="H", ylabel="estimate - real return", ylim=(-0.9, 0.4),
                 title=title)
    axes[0].set(xlabel="step", ylabel="(1 - gamma) V")
    axes[0].legend(fontsize=7)


def draw_critics(each, truth):
    """Critics (heads, T) and the true return (T,) along an episode."""
    _, axis = plt.subplots(figsize=(9, 2.4))
    axis.plot(truth, "k", lw=2, label="real return")
    axis.plot(each.T, lw=1, label=[f"critic {n + 1}" for n in range(len(each))])
    axis.set(xlabel="step", ylabel="(1 - gamma) Q")
    axis.legend(fontsize=7, ncols=2)


def promised_and_real(learner, episodes):
    """Of the toy's episodes: the critics' value at the first image, the return that came true, and
    whether it began on the left -> an array (episodes, 3)."""
    return np.array([(learner.value_estimate(one["image"][0]), toy.infinite_return(one["reward"]),
                      toy.where(one["image"][:1])[0][0] < 0) for one in episodes])


def draw_promises(agents):
    """Promised against real returns: {alpha: array as of `promised_and_real`}."""
    _, axes = plt.subplots(1, len(agents), figsize=(13, 3.2), sharex=True, sharey=True)
    for axis, (alpha, found) in zip(axes, agents.items()):
        left, gaps = found[:, 2] == 1, []
        for side, colour in ((left, "tab:red"), (~left, "tab:blue")):
            promised, real = found[side, :2].T
            axis.plot(real, promised, "o", ms=3, color=colour, alpha=0.6)
            gaps.append((promised - real).mean())
        axis.plot([0, 0.5], [0, 0.5], "k", lw=0.7)
        axis.set(xlabel="real return", title=f"alpha = {alpha:g}: promised - real\n"
                 f"{gaps[0]:+.2f} left (red), {gaps[1]:+.2f} right")
    axes[0].set_ylabel("promised")


def draw_learning(values, truth):
    """The critics' value over updates: {H: a list of curves, one for each seed}; dotted: truth."""
    _, axis = plt.subplots(figsize=(7, 2.6))
    for (H, curves), colour in zip(values.items(), ("tab:orange", "tab:blue", "tab:green")):
        for n, curve in enumerate(curves):
            axis.plot(pictures.running_mean(curve), color=colour, label="_" * n + f"H = {H}")
    axis.axhline(truth, color="grey", ls=":")
    axis.set(xlabel="updates", ylabel="(1 - gamma) Q")
    axis.legend(fontsize=8)


def draw_squashed(shapes, grid):
    """Samples and density of squashed normals: pairs of mu and sigma, actions (N,)."""
    _, axes = plt.subplots(1, len(shapes), figsize=(13, 2.3))
    for axis, (mu, sigma) in zip(axes, shapes):
        squashed = moto.TanhNormal(torch.tensor([mu]), torch.tensor([sigma]))
        samples, _ = squashed.rsample(torch.randn(len(grid), 1))
        axis.hist(samples[:, 0].numpy(), 60, density=True, alpha=0.4, label="samples")
        axis.plot(grid, squashed.log_prob(grid[:, None]).exp(), label="density")
        axis.set(title=f"mu = {mu}, sigma = {sigma}", xlabel="a")
    axes[0].legend()


HAND = "hand: x", "hand: y", "hand: z", "gripper"


def draw_prior(prior, actions, bound):
    """The behaviour prior along an episode (a TanhNormal of (T, 4)), what was recorded, and the
    actor's room."""
    _, axes = plt.subplots(1, 4, figsize=(13, 2.4), sharey=True)
    low, high = (torch.tanh(prior.mean + sign * 2 * prior.std) for sign in (-1, 1))
    mean, when, actions = prior.mode, range(len(prior.mean)), np.stack(actions)
    for n, (axis, name) in enumerate(zip(axes, HAND)):
        axis.fill_between(when, low[:, n], high[:, n], alpha=0.25)
        axis.fill_between(when, (mean[:, n] - bound).clamp(min=-1),
                          (mean[:, n] + bound).clamp(max=1), color="tab:orange", alpha=0.4)
        axis.plot(mean[:, n], lw=1)
        axis.plot(actions[:, n], "k.", ms=3)
        axis.set(title=name, xlabel="step")


@torch.no_grad()
def draw_corrections(agent, e, hit):
    """The target critics' value of corrections at features e (T, E), at three steps before the
    success at step `hit`: one number of d is varied, the others are the actor's."""
    grid, policy = torch.linspace(-1, 1, 41), agent.ema_policy
    _, axes = plt.subplots(1, 4, figsize=(13, 2.6), sharey=True)
    for before, colour in ((40, "tab:blue"), (20, "tab:orange"), (5, "tab:green")):
        t = max(hit - before, 0)
        chosen, here = policy.actor(e[t]), e[t].expand(41, -1)
        for n, (axis, name) in enumerate(zip(axes, HAND)):
            d = chosen.repeat(41, 1)
            d[:, n] = grid
            q = (1 - agent.cfg.gamma) * agent.target(here, policy.effective(here, d))
            q = q - q[:, 20:21]
            mean, std = q.mean(0), q.std(0)
            axis.plot(grid, mean, color=colour, label=f"{hit - t} steps before success")
            axis.fill_between(grid, mean - std, mean + std, color=colour, alpha=0.15)
            axis.plot(chosen[n], mean[(grid - chosen[n]).abs().argmin()], "o", color=colour)
            axis.set(title=name, xlabel="correction d")
    axes[0].set_ylabel(r"$(1-\gamma)\,Q(e, d)$, less that at $d_i = 0$")
    axes[-1].legend(fontsize=7)


@torch.no_grad()
def at_stake(agent, e, rows):
    """Print how much the target critics' value varies over 64 random corrections at features e
    (T, E), and how far critics were from their targets in the last ten rows of metrics."""
    e = e.repeat(64, 1, 1)
    d = agent.ema_policy.effective(e, 2 * torch.rand(*e.shape[:2], 4) - 1)
    spread = (1 - agent.cfg.gamma) * agent.target(e, d).mean(0).std(0).mean()
    losses = [row["critic/real"] for row in rows if "critic/real" in row][-10:]
    print(f"value over random corrections: standard deviation {spread:.3f}; a critic's distance "
          "from its own targets at the end of training "
          f"{np.sqrt(np.mean(losses) / agent.cfg.critics):.3f}")


def draw_bound(worlds, alphas):
    """Eq 16 in `worlds` (as of `random_mdp`): u against the true error; then, over alpha, what is
    achieved and what is promised, with this u and with its mean everywhere. Asserts the theorem."""
    _, axes = plt.subplots(1, 4, figsize=(15, 3.1))
    u, visits = (np.concatenate([w[name].ravel() for w in worlds]) for name in ("u", "visits"))
    error = np.concatenate([np.abs(w["P"] - w["P_hat"]).sum(-1).ravel() for w in worlds])
    axes[0].plot(u, error, ".", ms=2)
    axes[0].set(xlabel="u(s, a)", ylabel=r"$\sum |P - \hat P|$",
                title="disagreement and error, all MDPs")
    stripe = (u > 0.35) & (u < 0.45) & (error > 0.8)
    print(f"{stripe.sum()} pairs have u near 0.4 and an error above 0.8: "
          f"{(visits[stripe] == 1).sum()} of them were seen exactly once")
    for blind, name, colour in ((False, "u as measured", "tab:blue"),
                                (True, "u the same everywhere", "tab:orange")):
        rows = [in_one_world(world, alphas, blind) for world in worlds]
        achieved, promised, holds, theirs = np.mean(rows, 0).T
        axes[1].plot(alphas, achieved, "o-", ms=3, color=colour, label=rf"$J(\hat\pi)$, {name}")
        axes[2].plot(alphas, promised, ":", color=colour)
        axes[2].plot(alphas[holds == 1], promised[holds == 1], color=colour)
        axes[3].plot(alphas, holds, "o-", ms=3, color=colour)
        print(f"{name}: alpha = {alphas[0]:g} gives {achieved[0]:.3f}, the best alpha "
              f"({alphas[achieved.argmax()]:.2g}) {achieved.max():.3f}, the demonstrator "
              f"{theirs[0]:.3f}")
    axes[1].axhline(theirs[0], color="grey", ls=":", label=r"$J(\pi)$, the demonstrator")
    axes[1].set(xscale="log", xlabel=r"$\alpha$", ylabel="share of the optimum",
                title="what is achieved")
    axes[1].legend(fontsize=7, loc="lower left")
    axes[2].set(xscale="log", xlabel=r"$\alpha$", yscale="symlog", ylim=(-2e3, 2),
                title="what is promised (dotted: not proven)")
    axes[3].set(xscale="log", xlabel=r"$\alpha$", title="share of MDPs where it is proven")


def in_one_world(world, alphas, blind):
    """Eq 16 in one world for each alpha -> a list of J(pi_hat), the bound, whether its condition
    holds, and J(pi); returns as shares of the optimum. blind: with the mean of u everywhere."""
    P, r, gamma, start, pi = (world[name] for name in ("P", "r", "gamma", "start", "pi"))
    u = np.full_like(world["u"], world["u"].mean()) if blind else world["u"]
    J = lambda policy: start @ moto.tabular_value(P, r, policy, gamma)
    best, rows = J(moto.tabular_optimum(P, r, gamma, 200)), []
    for alpha in alphas:
        achieved, promised, holds = moto.tabular_bound(P, world["P_hat"], r, u, alpha, gamma, pi,
                                                       start)
        assert achieved >= promised - 1e-9 or not holds             # the theorem
        rows.append((achieved / best, promised / best, holds, J(pi) / best))
    return rows


def draw_kitchen(images, name, reward=None, predicted=None, dreams=None, most=None):
    """Images of an episode in Franka Kitchen, and below over steps: the true reward (T-1,) and the
    model's (T,) where given; the rewards of dreams (T, N); `most`: the largest of a demonstration,
    as a red line."""
    _, axes = plt.subplots(2, 1, figsize=(13, 3.2), height_ratios=[1, 1.2])
    film(axes[0], images, name, below=axes[1])
    if reward is not None:
        axes[1].plot([0, *reward], "k", label="true reward: wanted objects in place")
    if dreams is not None:
        axes[1].plot(dreams, "tab:green", lw=0.5, alpha=0.4)
    if predicted is not None:
        axes[1].plot(predicted, "tab:green" if dreams is None else "k",
                     label="the model's reward, of the images above")
    if most is not None:
        axes[1].axhline(most, color="tab:red", ls=":", label="the most in any demonstration")
    axes[1].set(xlabel="step", ylim=(-0.2, 4.3))
    axes[1].legend(loc="upper left", fontsize=7)


def scoreboard(*names):
    """A row for each named agent of toy.AGENTS, from the recorded file: returns and promises."""
    table = json.loads(toy.FILE.read_text())
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.36 * len(names)))
    for row, name in enumerate(names):
        seeds = table[name].values()
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
             xlabel="return")
    axis.grid(axis="y", lw=0.3)
    legend = (("from the left", "o", dict(color="tab:red")),
              ("from the right", "o", dict(color="tab:blue")),
              ("before practice", "o", dict(mfc="none", mec="grey")),
              ("promised", "x", dict(color="grey")))
    figure.legend(handles=[plt.Line2D([], [], ls="", marker=marker, label=label, **colours)
                           for label, marker, colours in legend],
                  loc="outside upper center", ncols=4, fontsize=8)
