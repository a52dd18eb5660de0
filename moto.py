"""MOTO in one file: offline pre-training to online fine-tuning for model-based robot learning, from
pixels. experiments/ has tasks, rollout workers, pictures, baselines, and what runs many runs.

    python moto.py --task drawer-open                      # demonstrate, pre-train, fine-tune, draw
    python moto.py --task hammer --variant no-unc          # an ablation; repeated, it resumes
    python moto.py --evaluate experiments/agents/drawer-open    # score an agent on fresh episodes
    python moto.py --help                                  # every setting, its symbol, its source

The paper: Rafailov, Hatch, Kolev, Martin, Phielipp, Finn, "MOTO: Offline Pre-training to Online
Fine-tuning for Model-based Robot Learning", CoRL 2023, arXiv 2401.03306.

The algorithm:
    1. collect a few demonstrations (images, actions, sparse rewards)
    2. repeat N times: the behaviour prior b(a|e) imitates the demonstrations; e, the feature of
       three images, learns with it (Eq 13, 15). Then both stay as they are
    3. repeat N times on the demonstrations (offline, where the agent stays the clone), then U
       times after each episode (online):
    4.     sample B sequences of T' steps for 5, and 20 B decisions of k + 1 steps for 6 to 8
    5.     world model: filter the features into latents (Eq 1); learn to predict the next latent
           with K heads (Eq 2), the image, the reward and e (Eq 3): the evidence lower bound
           (Eq 4, 5)
    6.     from real latents imagine H decisions of the current policy, each a correction of b's
           actions, held for k steps (Eq 8); where the K heads disagree (Eq 6) the reward is
           lowered (Eq 7)
    7.     expand the value along the imagined steps (Eq 9); critics: regress the value of the
           corrections really made on it (Eq 10, 11, 12)
    8.     online, after some failures: actor: raise the critics' value of its correction, and
           keep the correction small, the less so the more episodes there are (Eq 14)
Theorem B.1 says why lowering the reward is safe (Eq 16, on a table). The equations are numbered
here, not as in the paper, of which abstract, project page and captions were read ("[paper]").

Axes:    B batch, T time, T' = T - 2 (steps that have three images), H horizon, K ensemble,
         A action, E feature, D deterministic, S stochastic, F = D + S (state), N any number of
         rows (not the N above), P pixels a side, L steps of an episode (Eq 16: P transitions, X
         states).
Letters: x image, a action, r reward, z stochastic latent, h deterministic latent, s = (h, z),
         e feature of three images, b the behaviour prior (its mean action), d correction in units
         of its bound c (a demonstrator's may be larger), k steps for which it is held, u
         disagreement, gamma discount, lam the mixing weight of Eq 9, alpha the penalty, beta the
         behaviour weight.
Time:    a[t] and r[t] are the action that led INTO x[t] and the reward received on arriving there;
         a[0] = 0, r[0] = 0. So the action that leaves s[t] is a[t+1].
Sharp edges are marked "SHARP"; departures from the paper "DEPARTURE" (README lists them all).
"""
import argparse, contextlib, copy, dataclasses, difflib, functools, hashlib, importlib, inspect
import json, math, os, signal, sys, time, timeit
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch: large pages, updates 8 % faster
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


# ---- Config: every number of the method. Each field is a flag of the command line. ---------------

def opt(default, help, allowed=""):
    """A field of Config: its default, its meaning (symbol, [source]), its allowed interval."""
    return field(default=default, metadata={"help": help, "allowed": allowed})


@dataclass
class Config:
    # The task
    task: str = opt("drawer-open", "a Meta-World task, kitchen-partial, kitchen-mixed, gym:ENV_ID, "
                    "or gym:MODULE:ENV_ID for one that another package registers")
    variant: str = opt("moto", "moto, an ablation (each changes numbers of this config), or bc")
    preset: str = opt("auto", "debug (a minute), laptop (default on CPU), paper (default on a GPU)")
    seed: int = opt(0, "of networks, batches, demonstrations, episodes", "[0, 4294967296)")
    logdir: str = opt("", "run folder, continued if it holds a run; else runs/TASK-VARIANT-seedN")
    device: str = opt("auto", "cpu, cuda, or auto")
    precision: str = opt("auto", "float32, bfloat16, or auto: bfloat16 where that is faster")
    workers: int = opt(0, "processes that play episodes; 0: one per core, 8 at most", "[0, inf)")
    image_size: int = opt(64, "P, pixels a side, a multiple of 16 [paper: 64]", "[16, inf)")
    action_repeat: int = opt(2, "simulator steps per agent step [authors: 2]", "[1, inf)")
    episode_steps: int = opt(100, "L, the time limit in agent steps [paper: 200]", "[1, inf)")
    # Data
    data: str = opt("", "folder of .npz episodes (see README) or minari:ID; else scripted ones")
    demos: int = opt(10, "successful scripted demonstrations to collect [paper: 10]", "[1, inf)")
    demo_noise: float = opt(0.1, "standard deviation of the noise on scripted actions", "[0, inf)")
    cache: str = opt("runs/demos", "where demonstrations are kept for the next run")
    offline_fraction: float = opt(0.5, "online: share of a batch from the offline data", "[0, 1]")
    batch: int = opt(12, "B, sequences per batch [LOMPO: 64]", "[1, inf)")
    length: int = opt(24, "T, steps per sequence [LOMPO: 50]", "[1, inf)")
    # World model
    channels: int = opt(16, "width of the first convolution; it doubles three times", "[1, inf)")
    deter: int = opt(256, "D, size of h [LOMPO: 256]", "[1, inf)")
    stoch: int = opt(32, "S, size of z [LOMPO: 64]", "[1, inf)")
    hidden: int = opt(256, "width of the hidden layers", "[1, inf)")
    ensemble: int = opt(5, "K, prior heads, Eq 2 [LOMPO: 7]", "[1, inf)")
    free_nats: float = opt(1.0, "Eq 5: a KL below this is left alone [DreamerV2: 1]", "[0, inf)")
    reward_scale: float = opt(10.0, "c_r, Eq 4: weight of the reward's -ln p(r|s)", "[0, inf)")
    reward_head: str = opt("auto", "p(r|s), Eq 3: normal, or bernoulli (r is 0 or 1: Meta-World)")
    # Value expansion, critic, actor
    hold: int = opt(8, "k, steps for which a correction is held (DEPARTURE)", "[1, inf)")
    horizon: int = opt(1, "H, imagined decisions of k steps [LOMPO: 5 of one step]", "[0, inf)")
    gamma: float = opt(0.98, "discount", "[0, 1)")
    lam: float = opt(0.5, "Eq 9: weight of what is imagined", "[0, 1]")
    alpha: float = opt(0.5, "penalty, Eq 7: reward lost where u is twice its mean", "[0, inf)")
    critics: int = opt(5, "critics; the smaller one of two drawn is used [REDQ: 10]", "[1, inf)")
    imagined: float = opt(0.0, "weight of imagined decisions in the critic's loss", "[0, 1]")
    bound: float = opt(0.15, "c, largest correction of the prior's action (DEPARTURE)", "(0, 2]")
    beta: float = opt(5.0, "Eq 14: after n online episodes beta / n is the weight of the "
                      "correction's square. 0 (bound 1): no prior, d is the action", "[0, inf)")
    noise: float = opt(0.4, "std, in c, of the noise of every second online episode", "[0, inf)")
    warmup: int = opt(10, "online episodes without success before the actor learns", "[0, inf)")
    shift: int = opt(3, "random shifts of images in cloning, in pixels [DrQ: 4 of 84]", "[0, inf)")
    target_rate: float = opt(0.02, "Eq 12: step of the target critics to the critics", "[0, 1]")
    ema_rate: float = opt(0.005, "smallest step of the averaged weights (DEPARTURE)", "[0, 1]")
    model_lr: float = opt(6e-4, "learning rate of the world model [LOMPO: 6e-4]", "(0, inf)")
    actor_lr: float = opt(3e-4, "learning rate of encoder, prior, actor [LOMPO: 3e-4]", "(0, inf)")
    critic_lr: float = opt(1e-3, "learning rate of the critics [LOMPO: 3e-4]", "(0, inf)")
    # Loops
    offline_updates: int = opt(800, "N, of the prior, then of the rest [paper: 1000]", "[0, inf)")
    online_episodes: int = opt(30, "online episodes [paper: up to 500]", "[0, inf)")
    updates_per_episode: int = opt(40, "U, updates after each of them [paper: 50]", "[1, inf)")
    eval_every: int = opt(200, "updates between evaluations; none in the second stage", "[1, inf)")
    final_episodes: int = opt(50, "episodes per offline and final score; else a fifth", "[1, inf)")
    log_every: int = opt(25, "updates per line of metrics.jsonl", "[1, inf)")
    save_every: int = opt(250, "updates between checkpoints", "[1, inf)")


DECISIONS = 20              # decisions per sequence of a batch, each drawn by itself
FRAMES = 3                  # images that the feature e sees [paper's baselines: 3]
GRAD_CLIP = 100.0           # largest norm of each optimiser's gradient [DreamerV2: 100]
MIN_STD = 0.05              # smallest standard deviation of the behaviour prior
KL_BALANCE = 0.8            # w, Eq 5: the prior's share of the KL [DreamerV2: 0.8]

PRESETS = {
    "laptop": {},
    "debug": dict(workers=1, episode_steps=60, demos=2, demo_noise=0.0, batch=4, length=12,
                  channels=4, deter=32, stoch=8, hidden=32, offline_updates=20, online_episodes=2,
                  updates_per_episode=5, warmup=1, eval_every=20, final_episodes=2, log_every=5,
                  save_every=10),
    "paper": dict(episode_steps=200, batch=64, length=50, channels=32, stoch=64, ensemble=7,
                  critic_lr=3e-4, offline_updates=1000, online_episodes=400,
                  updates_per_episode=50, eval_every=2500, final_episodes=100, save_every=1000),
}
HARD = dict(episode_steps=200, offline_updates=2000, online_episodes=100, updates_per_episode=60,
            eval_every=2000)
KITCHENS = "kitchen-partial", "kitchen-mixed"
KITCHEN = dict(action_repeat=1, episode_steps=280, demos=100)
TASKS = {                         # by preset: a task's protocol and budget, nothing else
    "laptop": dict.fromkeys(("assembly", "bin-picking", "box-close", "coffee-push", "disassemble",
                             "hammer"), HARD)
    | dict.fromkeys(KITCHENS, KITCHEN | dict(
        offline_updates=5000, online_episodes=100, updates_per_episode=20, eval_every=1000,
        final_episodes=20)),
    "debug": dict.fromkeys(KITCHENS, KITCHEN | dict(demos=2, final_episodes=1)),
    "paper": dict.fromkeys(KITCHENS, KITCHEN | dict(offline_updates=10_000, online_episodes=1300)),
}
NO_BC = dict(beta=0.0, bound=1.0)
VARIANTS = {
    "moto": {},
    "no-unc": dict(alpha=0.0),
    "no-mve": dict(lam=0.0),                                        # nothing imagined counts
    "no-bc": NO_BC,
    "no-bc-no-unc": NO_BC | dict(alpha=0.0),
    "dreamerv2": NO_BC | dict(alpha=0.0, imagined=1.0, hold=1, horizon=5, lam=0.95),  # all dreamt
    "bc": dict(online_episodes=0),                                  # the behaviour prior alone
}
BASELINES = "iql", "cql", "sac"    # experiments/baselines.py adds them to VARIANTS and AGENTS


class UserError(Exception):
    """Bad input or a bad machine: one sentence with cause and remedy. Exit code 2."""


class EpisodeError(UserError):
    """An episode could not be played. A run saves what was learned before it ends."""


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; raised at the next step boundary."""


stop_requested = {"signal": None}
sys.modules.setdefault("moto", sys.modules[__name__])    # experiments/ import this very module


def exit_if_asked():
    if stop_requested["signal"]:
        raise Stopped


# ---- Networks ------------------------------------------------------------------------------------

class Encoder(nn.Sequential):
    """Stacked images (N, 3 * FRAMES, P, P) -> feature e (N, E), E = cfg.hidden: what the policy,
    the critics and the world model's filter read (DEPARTURE). Layer norm and tanh keep it bounded.
    Sources: Dreamer for the convolutions, DrQ for the rest."""

    def __init__(self, cfg):
        widths = [3 * FRAMES] + [cfg.channels * m for m in (1, 2, 4, 8)]
        convolutions = [layer for i, o in zip(widths, widths[1:])
                        for layer in (nn.Conv2d(i, o, 4, 2, 1), nn.SiLU())]
        super().__init__(*convolutions, nn.Flatten(),
                         nn.Linear(widths[-1] * (cfg.image_size // 16) ** 2, cfg.hidden), nn.SiLU(),
                         nn.Linear(cfg.hidden, cfg.hidden), nn.LayerNorm(cfg.hidden), nn.Tanh())


class Decoder(nn.Module):
    """State (N, F) -> mean image (N, 3, P, P): the encoder's convolutions backwards."""

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.channels * m for m in (8, 4, 2, 1)] + [3]
        self.shape = cfg.image_size // 16, cfg.image_size // 16, widths[0]
        self.inp = nn.Linear(cfg.deter + cfg.stoch, math.prod(self.shape))
        layers = [layer for i, o in zip(widths, widths[1:])
                  for layer in (nn.ConvTranspose2d(i, o, 4, 2, 1), nn.SiLU())]
        self.convolutions = nn.Sequential(*layers[:-1])

    def forward(self, feat):
        return self.convolutions(self.inp(feat).unflatten(-1, self.shape).permute(0, 3, 1, 2))


def mlp(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.SiLU(),
                         nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.SiLU(),
                         nn.Linear(hidden, outputs))


class EnsembleMLP(nn.Module):
    """K separate small networks on one input (N, I) -> (K, N, O), as batched matrix products.

    Each head owns a block of columns of the first layer, and a matrix of each of the `depth`
    others. Their different beginnings make them disagree off the data. `norm`: layer norm."""

    def __init__(self, heads, inputs, hidden, outputs, depth=1, norm=False):
        super().__init__()
        self.heads, self.hidden, self.norm = heads, hidden, norm
        self.first = nn.Linear(inputs, heads * hidden)
        sizes = [hidden] * depth + [outputs]
        self.weights = nn.ParameterList(torch.empty(heads, i, o).uniform_(-i ** -0.5, i ** -0.5)
                                        for i, o in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.zeros(heads, 1, o) for o in sizes[1:])

    def forward(self, inp):
        y = self.first(inp).unflatten(-1, (self.heads, self.hidden)).transpose(0, 1)
        for weight, bias in zip(self.weights, self.biases):             # y (K, N, hidden)
            y = F.layer_norm(y, y.shape[-1:]) if self.norm else y
            y = torch.baddbmm(bias, F.silu(y), weight)
        return y


class TanhNormal:
    """Eq 15, the prior's distribution: a = tanh(n), n ~ Normal(mean, std), with its log-density.

        ln b(a|e) = sum_A [ ln Normal(artanh a; mean, std) - ln(1 - a^2) ]

    mean, std: (..., A). The second term is the logarithm of da/dn; written with n it is
    2 (ln 2 - n - softplus(-2n)), which stays finite where 1 - a^2 rounds to zero.
    Source: Haarnoja et al. 2018 (SAC), appendix C."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    @property
    def mode(self):
        """The mean action (..., A): tanh of the Normal's mean."""
        return torch.tanh(self.mean)

    def log_density_at(self, n):
        """ln b(tanh n | e): (..., A) -> (...)."""
        error = (n - self.mean) / self.std
        normal = -0.5 * error ** 2 - self.std.log() - 0.5 * math.log(2 * math.pi)
        return (normal - 2 * (math.log(2) - n - F.softplus(-2 * n))).sum(-1)

    def rsample(self, noise):
        """Standard normal noise (..., A) -> an action with gradient, and its log-density."""
        n = self.mean + self.std * noise
        return torch.tanh(n), self.log_density_at(n)

    def log_prob(self, a):
        """Log-density (...) of actions (..., A) strictly inside (-1, 1)."""
        return self.log_density_at(torch.atanh(a))


class GaussianActor(nn.Module):
    """Feature (..., E) -> TanhNormal over actions (..., A), MIN_STD < std < 2 + MIN_STD. As the
    behaviour prior it is b; the model-free baselines learn with it, too."""

    def __init__(self, cfg, action_size):
        super().__init__()
        self.net = mlp(cfg.hidden, cfg.hidden, 2 * action_size)

    def forward(self, e):
        mean, raw = self.net(e).float().chunk(2, -1)
        return TanhNormal(mean, 2 * torch.sigmoid(raw / 2) + MIN_STD)


class Actor(nn.Module):
    """Feature (..., E) -> correction d (..., A) of the prior's action, in (-1, 1), in units of its
    bound c. It begins at zero. Source: residual policies, Silver et al. 2018."""

    def __init__(self, cfg, action_size):
        super().__init__()
        self.net = mlp(cfg.hidden, cfg.hidden, action_size)
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, e):
        return torch.tanh(self.net(e).float())


class Critic(nn.Module):
    """`heads` critics: feature (..., E), correction or action (..., A) -> Q (heads, ...).

    The networks' output is Q in units of 1 / (1 - gamma), the return of a reward of one for ever;
    so are losses and metrics. Normalised layers keep the critics from extrapolating apart off the
    data. Source: RLPD (Ball 2023)."""

    def __init__(self, cfg, action_size, heads=2):
        super().__init__()
        self.unit, self.heads = 1 / (1 - cfg.gamma), heads
        self.nets = EnsembleMLP(heads, cfg.hidden + action_size, cfg.hidden, 1, depth=2, norm=True)

    def forward(self, e, d):
        inp = torch.cat([e, d], -1)
        q = self.nets(inp.flatten(0, -2)).float()
        return self.unit * q.reshape(self.heads, *inp.shape[:-1])

    def smaller_of_two(self, e, d):
        """The smaller Q (...) of two critics drawn at random (DEPARTURE). Source: REDQ."""
        drawn = torch.randperm(self.heads, device=e.device)[:2]
        return self(e, d)[drawn].min(0).values


# ---- World model: the RSSM with an ensemble of priors --------------------------------------------

def gaussian(raw):
    """Split (..., 2S) into mean and standard deviation (..., S) >= 0.1 [PlaNet]."""
    mean, raw = raw.float().chunk(2, -1)
    return mean, F.softplus(raw + 0.54) + 0.1           # softplus(0.54) = 1: starts near one


class WorldModel(nn.Module):
    """Recurrent state-space model [PlaNet, Dreamer] with K prior heads that share h [LOMPO]."""

    def __init__(self, cfg, action_size, terminates):
        super().__init__()
        feat = cfg.deter + cfg.stoch
        self.cfg, self.decoder = cfg, Decoder(cfg)
        self.mix = nn.Sequential(nn.Linear(cfg.stoch + action_size, cfg.hidden), nn.SiLU())
        self.gru = nn.GRUCell(cfg.hidden, cfg.deter)
        self.posterior_net = nn.Sequential(
            nn.Linear(cfg.deter + cfg.hidden, cfg.hidden), nn.LayerNorm(cfg.hidden), nn.SiLU(),
            nn.Linear(cfg.hidden, 2 * cfg.stoch))
        self.priors = EnsembleMLP(cfg.ensemble, cfg.deter, cfg.hidden, 2 * cfg.stoch)
        self.reward = mlp(feat, cfg.hidden, 1)
        self.feature = mlp(feat, cfg.hidden, cfg.hidden)
        self.continuation = mlp(feat, cfg.hidden, 1) if terminates else None
        self.register_buffer("disagreement_mean", torch.zeros(()))   # on the data: Eq 7

    def recurrence(self, h, z, a):
        """h_t = GRU(h_{t-1}, [z_{t-1}, a_t]): (N, D), (N, S), (N, A) -> (N, D)."""
        return self.gru(self.mix(torch.cat([z, a], -1)), h.to(z.dtype)).float()

    def posterior(self, h, e):
        """Eq 1, the filter: q(z_t | h_t, e_t). h (N, D), e (N, E) -> mean, std (N, S)."""
        return gaussian(self.posterior_net(torch.cat([h, e], -1)))

    def prior(self, h):
        """Eq 2, the ensemble: p_m(z_t | h_t), m = 1..K. h (N, D) -> mean, std (K, N, S)."""
        return gaussian(self.priors(h))

    def observe(self, e, a, is_first):
        """Eq 1 along sequences: e (B, T, E), a (B, T, A), is_first (B, T) -> h, z, mean, std
        (B, T, .). State and action are zero where `is_first` marks a new episode."""
        B, T = a.shape[:2]
        h, z, steps = a.new_zeros(B, self.cfg.deter), a.new_zeros(B, self.cfg.stoch), []
        noise = torch.randn(B, T, self.cfg.stoch, device=a.device)
        keep = (~is_first).float().unsqueeze(-1)
        with torch.autocast(a.device.type, enabled=False):        # B rows: float32 is faster
            for t in range(T):
                h = self.recurrence(h * keep[:, t], z * keep[:, t], a[:, t] * keep[:, t])
                mean, std = self.posterior(h, e[:, t])
                z = mean + std * noise[:, t]
                steps.append((h, z, mean, std))
        return [torch.stack(column, 1) for column in zip(*steps)]

    def expected_reward(self, feat):
        """E[r | s] under Eq 3's reward head: (..., F) -> (...)."""
        raw = self.reward(feat).float().squeeze(-1)
        return torch.sigmoid(raw) if self.cfg.reward_head == "bernoulli" else raw

    def expected_continuation(self, feat):
        """P(the task does not end at s): (..., F) -> (...); one where tasks never terminate."""
        if self.continuation is None:
            return torch.ones(feat.shape[:-1], device=feat.device)
        return torch.sigmoid(self.continuation(feat).float().squeeze(-1))


def decoder_losses(model, feat, x, e, r, is_terminal):
    """Eq 3: negative log-likelihoods of image, reward, feature and (where modelled) continuation.

        x_t ~ Normal(decoder(s_t), 1)       r_t ~ Bernoulli or Normal(reward(s_t), 1)
        e_t ~ Normal(feature(s_t), 1)

    feat (B, T, F), x (B, T, 3, P, P), e (B, T, E), r, is_terminal (B, T).
    Half of the images are decoded, drawn at random: their mean is an unbiased estimate. Returns a
    dict of scalars in nats per step (the Normals' without their constant). Source: Dreamer."""
    def half_square(error, first):
        return 0.5 * error.float().square().flatten(first).sum(-1).mean()
    N = feat[..., 0].numel()
    chosen = torch.randperm(N, device=feat.device)[:max(1, N // 2)]
    image = model.decoder(feat.flatten(0, 1)[chosen])
    losses = {"image": half_square(image - x.flatten(0, 1)[chosen], 1),
              "feature": half_square(model.feature(feat) - e, 2)}
    raw = model.reward(feat).float().squeeze(-1)
    if model.cfg.reward_head == "bernoulli":
        losses["reward"] = F.binary_cross_entropy_with_logits(raw, r)
    else:
        losses["reward"] = 0.5 * (raw - r).square().mean()
    if model.continuation is not None:
        raw = model.continuation(feat).float().squeeze(-1)
        losses["continuation"] = F.binary_cross_entropy_with_logits(raw, 1 - is_terminal)
    return losses


def kl_normal(mean_q, std_q, mean_p, std_p):
    """KL(q || p) of diagonal Gaussians in nats, summed over the last axis (S)."""
    ratio = (std_q / std_p).square()
    return 0.5 * (ratio + ((mean_q - mean_p) / std_p).square() - 1 - ratio.log()).sum(-1)


def kl_balanced(q, p, balance, free_nats):
    """Eq 5: KL balancing with free nats.

        KL = w KL(sg q || p) + (1 - w) KL(q || sg p),   each clipped below at free_nats

    q: (mean, std) of (N, S); p: (mean, std) of (K, N, S). w = `balance`; sg stops the gradient, so
    w = 0.8 moves the prior towards the posterior four times as hard as the other way round. Returns
    nats (K, N). Source: DreamerV2; DreamerV3 for clipping each step's KL, not their mean."""
    q_sg, p_sg = [value.detach() for value in q], [value.detach() for value in p]
    train_prior = kl_normal(*q_sg, *p).clamp(min=free_nats)
    train_posterior = kl_normal(*q, *p_sg).clamp(min=free_nats)
    return balance * train_prior + (1 - balance) * train_posterior


def model_loss(model, batch):
    """Eq 4: the negative evidence lower bound, the KL averaged over the K heads.

        L = -ln p(x_t|s_t) - ln p(e_t|s_t) - c_r ln p(r_t|s_t) + mean_m KL(q(z_t) || p_m(z_t)),
        s_t ~ q (Eq 1);   and -ln p(end_t|s_t), where a task can end

    batch: dict of x (B, T, 3, P, P), e (B, T, E), a (B, T, A), r, is_terminal, is_first (B, T).
    Returns (loss, metrics)."""
    cfg = model.cfg
    h, z, *posterior = model.observe(batch["e"], batch["a"], batch["is_first"])
    feat = torch.cat([h, z], -1)
    losses = decoder_losses(model, feat, *(batch[name] for name in ("x", "e", "r", "is_terminal")))
    prior = model.prior(h.flatten(0, 1))
    posterior = [value.flatten(0, 1) for value in posterior]
    losses["kl"] = kl_balanced(posterior, prior, KL_BALANCE, cfg.free_nats).mean()
    metrics = {f"model/{name}": value.detach() for name, value in losses.items()}
    metrics["model/disagreement"] = disagreement(prior[0]).mean().detach()
    losses["reward"] = cfg.reward_scale * losses["reward"]
    return sum(losses.values()), metrics


# ---- Imagination under the penalty ---------------------------------------------------------------

def disagreement(means):
    """Eq 6: epistemic uncertainty u(s, a), the standard deviation of the K means, its mean over S.

    means (K, ..., S) -> (...). The heads saw the same data from different initialisations: where
    there was data they agree, elsewhere they need not. Zero for K = 1. Sources: LOMPO, whose
    default takes the heads' log-densities instead; Lakshminarayanan et al. 2017."""
    variance = (means - means.mean(0)).square().mean(0)
    return (variance + 1e-12).sqrt().mean(-1)            # SHARP: sqrt has an infinite slope at 0


def penalised_reward(reward, u, alpha, disagreement_mean):
    """Eq 7: the reward of imagined steps.

        r~(s, a) = E[r(s')] - alpha u(s, a)

    reward, u: (...). DEPARTURE: u here is the excess over `disagreement_mean`, the running mean of
    u on the data, in units of that mean: max(0, u / disagreement_mean - 1). Heads never agree
    exactly; alpha keeps its meaning while the model learns, and across tasks. Source: MOPO."""
    return reward - alpha * (u / disagreement_mean - 1).clamp(min=0)


@torch.no_grad()
def imagine(model, policy, actor, h, z, e, horizon, hold):
    """Eq 8: roll the model out under the policy, which makes H decisions of k steps each.

        d^j = actor(e^j);   for each of its k steps:   a = clip(b(e) + c d^j),
        s' ~ p_m(.|s, a), m drawn afresh for each step;   e' = feature(s')

    h (N, D), z (N, S), e (N, E) of real steps; policy: a Policy, which has b and c -> dict of e
    (H+1, N, E) and the effective d (H+1, N, A), one per decision; feat (H k + 1, N, F), one per
    state, and u (H k, N), one per step: of the state before it and its action.
    Sources: Dreamer; LOMPO and PETS for the drawn head."""
    N, K = h.shape[0], model.cfg.ensemble
    es, ds, feats, us = [e], [actor(e)], [torch.cat([h, z], -1)], []
    for _ in range(horizon):
        for _ in range(hold):
            h = model.recurrence(h, z, policy.action(e, ds[-1]))
            means, stds = model.prior(h)
            us.append(disagreement(means))
            m = torch.randint(K, (N,), device=h.device), torch.arange(N, device=h.device)
            z = means[m] + stds[m] * torch.randn_like(z)
            feats.append(torch.cat([h, z], -1))
            e = model.feature(feats[-1]).float()
        es.append(e)
        ds.append(actor(e))
    e, d = torch.stack(es), torch.stack(ds)
    return {"e": e, "d": policy.effective(e, d), "feat": torch.stack(feats),
            "u": torch.stack(us) if us else h.new_zeros(0, N)}          # H = 0: no model at all


# ---- Value expansion and the critic --------------------------------------------------------------

def accumulate(reward, discount):
    """The steps of one decision as one: reward and discount (..., k) -> the sum of the rewards,
    each times the discounts before it, and the product of the discounts (...)."""
    before = torch.cat([torch.ones_like(discount[..., :1]), discount[..., :-1].cumprod(-1)], -1)
    return (before * reward).sum(-1), discount.prod(-1)


def value_expansion(reward, discount, q, lam):
    """Eq 9: a lambda-return that begins at horizon 0, over H imagined decisions, backwards.

        V^j = (1 - lam) Q(e^j, d^j) + lam [r~^j + discount^j V^{j+1}],   V^H = Q(e^H, d^H)

    reward, discount (H, N), accumulated over the k steps of each decision: penalised rewards, and
    gamma times the continuation. q (H+1, N): the smaller target critic. Returns V (H+1, N).
    Sources: Feinberg et al. 2018 (MVE); Sutton and Barto, chapter 12."""
    V = [q[-1]]
    for j in reversed(range(len(reward))):
        V.insert(0, (1 - lam) * q[j] + lam * (reward[j] + discount[j] * V[0]))
    return torch.stack(V)


def real_decisions(a, b, r, is_terminal, valid, bound, gamma):
    """What was done and earned in the k steps of each of N decisions that were really made.

    a, b (N, k, A): the actions, and the prior's; r, is_terminal, valid (N, k) -> d (N, A): the mean
    correction (a - b) / c; reward and discount (N,); weight (N,): one where the k steps are of one
    episode, or end with the task's end. SHARP: they may span two held corrections; d is the mean.
    """
    reward, discount = accumulate(r, gamma * (1 - is_terminal))
    reached = F.pad(is_terminal[:, :-1].cumsum(1) == 0, (1, 0), value=True)     # the end included
    d = ((a - b) / bound * reached.unsqueeze(-1)).sum(1) / reached.sum(1, keepdim=True)
    return d, reward, discount, (valid.bool() | ~reached).all(1).float()


def critic_target(reward, discount, V0):
    """Eq 10: the target of a real decision: the real rewards of its k steps, then the model.

        y_t = sum_{i<k} gamma^i r_{t+1+i} + gamma^k V^0(s_{t+k})

    reward, discount (N,) as from `real_decisions`; V0 (N,): V^0 at the state that follows: Q at its
    real feature, and imagination from its filtered latent. The real reward is not penalised. SHARP:
    the discount is zero where the task ended; at a time limit it is not, and the value goes on. The
    target of imagined decisions is V^j itself."""
    return reward + discount * V0


def weighted_mean(value, weight):
    """Mean of `value`, weighted by `weight` >= 0 (same shape)."""
    return (weight * value).sum() / weight.sum().clamp(min=1)


def critic_loss(q, y, weight, unit):
    """Eq 11: the critics' squared errors, summed over critics, in units of `unit` (see Critic).

    q (heads, ...), y, weight (...) -> scalar. The targets carry no gradient. The critics differ by
    their initialisation; the smaller one of two is used in V [TD3]."""
    return weighted_mean(((q - y.detach()) / unit).square().sum(0), weight)


@torch.no_grad()
def update_target(target, source, rate):
    """Eq 12: target <- (1 - rate) target + rate source, parameter by parameter. Source: DDPG."""
    for slow, fast in zip(target.parameters(), source.parameters()):
        slow.lerp_(fast, rate)


# ---- The actor and its behaviour prior -----------------------------------------------------------

def action_nll(actor, e, a):
    """-ln b(a_{t+1} | e_t) in nats: e (B, T, E), a (B, T, A) -> (B, T-1). Actions are clipped to
    +-0.99: artanh is infinite at +-1."""
    return -actor(e[:, :-1]).log_prob(a[:, 1:].clamp(-0.99, 0.99))


def behaviour_loss(prior, e, a, valid):
    """Eq 13: the behaviour prior, maximum likelihood of the offline actions.

        L = -E_data[ln b(a_{t+1} | e_t)]

    e (B, T, E), a (B, T, A), valid (B, T-1): one where a_{t+1} left step t. Alone it is behaviour
    cloning. Returns nats per action."""
    return weighted_mean(action_nll(prior, e, a), valid)


def actor_loss(q, d, weight):
    """Eq 14: raise the critics' value of the correction, stay near the behaviour prior.

        L = -E[Q(e, d)] / E|Q(e, d)| + beta / n E[d^2],    d = actor(e)

    q (heads, ...), of what the limits of an action leave of d; d (..., A), its square averaged over
    A; weight: beta / n, n all online episodes so far: the more practice the critics have seen, the
    less they need the prior. Divided by its own size the value has no scale, and |d| <= 1 bounds
    the correction. Source: TD3+BC."""
    return -q.mean() / q.abs().mean().detach().clamp(min=1e-3) + weight * d.square().mean()


# ---- Why the penalty is safe, on a table ---------------------------------------------------------

def tabular_value(P, r, pi, gamma):
    """Exact values (X,) of policy pi (X, A) under transitions P (X, A, X), rewards r (X, A)."""
    P_pi, r_pi = np.einsum("xa,xay->xy", pi, P), (pi * r).sum(1)
    return np.linalg.solve(np.eye(len(r)) - gamma * P_pi, r_pi)


def tabular_optimum(P, r, gamma, sweeps=2000):
    """The optimal deterministic policy as (X, A) zeros and ones, by value iteration."""
    q = np.zeros_like(r)
    for _ in range(sweeps):
        q = r + gamma * P @ q.max(1)
    return np.eye(r.shape[1])[q.argmax(1)]


def tabular_bound(P, P_hat, r, u, alpha, gamma, pi, start):
    """Eq 16, MOPO's bound, taken for Theorem B.1's, on a table: the policy that is optimal in the
    penalised model is nearly as good as any policy pi whose actions the model knows.

        J(pi_hat) >= J(pi) - 2 alpha E_pi[u]
        if alpha u(s, a) >= gamma max|V| |P_hat - P|_1 at every (s, a)

    P true, P_hat learned transitions (X, A, X); r, u (X, A); pi (X, A); start (X,). E_pi[u] is the
    discounted sum of u along pi in the model. Returns (J(pi_hat), the right-hand side, whether the
    condition holds). SHARP: Eq 7 charges only what u exceeds its mean by, and disagreement need not
    bound the error: the theorem is why there is a penalty, not a promise. Source: MOPO, 4.4."""
    pi_hat = tabular_optimum(P_hat, r - alpha * u, gamma)
    J = lambda policy: start @ tabular_value(P, r, policy, gamma)
    largest_value = np.abs(r).max() / (1 - gamma)
    error = np.abs(P - P_hat).sum(-1) * gamma * largest_value   # >= gamma |E_P V - E_P_hat V|
    bound = J(pi) - 2 * alpha * start @ tabular_value(P_hat, u, pi, gamma)
    return J(pi_hat), bound, bool((alpha * u >= error - 1e-12).all())


# ---- The agent -----------------------------------------------------------------------------------

def to_image(x):
    """uint8 (..., P, P, 3) -> float (..., 3, P, P) in [-0.5, 0.5]."""
    return x.float().div_(255).sub_(0.5).movedim(-1, -3)


def to_uint8(x):
    """float (..., 3, P, P) around [-0.5, 0.5] -> uint8 array (..., P, P, 3)."""
    return ((x.float() + 0.5).clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()


def random_shift(image, pixels):
    """Move each image (N, P, P, C) by up to `pixels` down and across; its edge repeats [DrQ]."""
    N, P = len(image), image.shape[-2]
    shift = torch.randint(-pixels, pixels + 1, (2, N, 1), device=image.device)
    rows, columns = (torch.arange(P, device=image.device) + shift).clamp(0, P - 1)
    each = torch.arange(N, device=image.device)[:, None, None]
    return image[each, rows[:, :, None], columns[:, None, :]]


class Policy(nn.Module):
    """What acts: encoder, prior and (in MOTO) actor, as exponential moving averages of the trained
    weights (DEPARTURE): one update moves the hand by the millimetres that decide a grasp."""

    def __init__(self, cfg, encoder, prior, actor=None):
        super().__init__()
        self.cfg, self.encoder, self.prior = cfg, copy.deepcopy(encoder), copy.deepcopy(prior)
        self.actor = copy.deepcopy(actor)
        self.register_buffer("updates", torch.zeros(()))
        self.requires_grad_(False)

    def update_ema(self, **newest):
        """One step of the averages of the named modules, whose window is a tenth of all steps so
        far, the prior's included, at most 1 / ema_rate. Source: Shamir and Zhang 2013,
        polynomial-decay averaging."""
        rate = max(self.cfg.ema_rate, 10 / (10 + float(self.updates)))
        self.updates += 1
        for name, module in newest.items():
            update_target(getattr(self, name), module, rate)

    def prior_action(self, e):
        """b: the prior's mean action (..., A); zero where beta is, in the variants without it."""
        b = self.prior(e).mode
        return b if self.cfg.beta else torch.zeros_like(b)

    def action(self, e, d):
        """The action for feature e (..., E) under the correction d (..., A)."""
        return (self.prior_action(e) + self.cfg.bound * d).clamp(-1, 1)

    def effective(self, e, d):
        """What the limits of an action leave of the correction d: what the critics are asked."""
        return (self.action(e, d) - self.prior_action(e)) / self.cfg.bound

    def encode(self, image):
        """Features e (L, E) of an episode's first L images, uint8 (L, P, P, 3)."""
        image = torch.as_tensor(image, device=self.updates.device)
        image = torch.cat([image[:1]] * (FRAMES - 1) + [image])[None]
        one_episode = torch.zeros(image.shape[:2], dtype=torch.bool, device=image.device)
        return self.encoder(to_image(stacked(image, one_episode)[0]))

    def act(self, image, state=None, generator=None):
        """One step: uint8 image (P, P, 3), carried state (None at a reset) -> a (A,), next state.

        With a generator each decision has noise, kept for its k steps and within the bound; a
        policy without an actor samples each action. Without one the action is the mean."""
        def noise(like):
            return torch.randn(like.shape, generator=generator).to(like.device)
        x = to_image(torch.as_tensor(image, device=self.updates.device))[None]
        frames, d, step = state or ((x,) * FRAMES, None, 0)
        frames = (*frames[1:], x)
        e = self.encoder(torch.cat(frames, 1))
        if self.actor is None:
            policy = self.prior(e)
            a = policy.mode if generator is None else policy.rsample(noise(policy.mean))[0]
        else:
            if step % self.cfg.hold == 0:
                d = self.actor(e)
                if generator is not None:
                    d = (d + self.cfg.noise * noise(d)).clamp(-1, 1)
            a = self.action(e, d)
        return a[0].cpu().numpy(), (frames, d, step + 1)


def stacked(image, is_first):
    """Images of steps t - FRAMES + 1 to t along the channels: (B, T, P, P, 3) -> (B, T', P, P,
    3 * FRAMES), T' = T - FRAMES + 1. Before an episode's beginning (`is_first`, (B, T)) its first
    image is repeated."""
    B, T = is_first.shape
    t, row = torch.arange(T, device=image.device), torch.arange(B, device=image.device)[:, None]
    first = torch.where(is_first, t, 0).cummax(1).values
    return torch.cat([image[row, torch.maximum(t - n, first)[:, FRAMES - 1:]]
                      for n in reversed(range(FRAMES))], -1)


class Agent:
    """What every agent is: modules by name, an optimiser for some of them, `step`, and its state.

    A subclass makes its modules, calls `prepare`, and has `update(batch)` -> metrics, `ema_policy`
    (a Policy), and, with critics, `value_estimate(image)` for an episode's first image."""
    value_estimate = None
    stages = 1                                            # of N offline updates each
    episodes = failures = 0                               # online ones so far; without success

    def __init__(self, cfg, device):
        self.cfg, self.device = cfg, torch.device(device)
        torch.manual_seed(cfg.seed)

    def prepare(self, **rates):
        """Move the modules to the device; Adam for each of those named in `rates`."""
        self.modules = {name: module.to(self.device) for name, module in vars(self).items()
                        if isinstance(module, nn.Module)}
        self.optimisers = {
            name: torch.optim.Adam(self.modules[name].parameters(), lr=rate, eps=1e-6, fused=True)
            for name, rate in rates.items()}

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, self.cfg.precision == "bfloat16")

    def encode_frames(self, batch):
        """The encoder on a batch, each stack shifted by itself -> e (B, T', E), and the batch of
        (B, T', ...): the first steps have no whole stack."""
        x = stacked(batch["image"], batch["is_first"])
        batch = {name: value[:, FRAMES - 1:] for name, value in batch.items()}
        x = random_shift(x.flatten(0, 1), self.cfg.shift)
        with self.autocast():
            e = self.encoder(to_image(x)).float()
        return e.unflatten(0, batch["a"].shape[:2]), batch

    def step(self, loss, *names):
        """One optimiser step on `loss` for each of the named modules -> their gradients' norms.
        Raises FloatingPointError, before any parameter moves, on a gradient that is not finite."""
        for name in names:
            self.optimisers[name].zero_grad()
        loss.backward()
        norms = {}
        for name in names:
            parameters = self.modules[name].parameters()
            norms[f"grad/{name}"] = norm = nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"the {' and '.join(names)} loss is {loss.item()}, the "
                                         f"gradient of the {name} {float(norm)}")
        for name in names:
            self.optimisers[name].step()
        return norms

    def state_dict(self):
        return {kind: {name: part.state_dict() for name, part in getattr(self, kind).items()}
                for kind in ("modules", "optimisers")}

    def load_state_dict(self, state):
        for kind in ("modules", "optimisers"):
            for name, part in getattr(self, kind).items():
                part.load_state_dict(state[kind][name])

    def acting_state(self):
        """What acts, dreams and criticises, in half precision: a seventh of the whole."""
        return {name: {key: v.half() if v.ndim else v
                       for key, v in self.modules[name].state_dict().items()}
                for name in ("ema_policy", "model", "target") if name in self.modules}

    def load_acting(self, state):
        for name, values in state.items():
            self.modules[name].load_state_dict(values)


def as_numbers(metrics):
    """A dict of scalar tensors -> floats, in one transfer."""
    values = torch.stack([value.detach().float() for value in metrics.values()])
    return dict(zip(metrics, values.tolist()))


class BC(Agent):
    """The behaviour prior alone, Eq 13: behaviour cloning from stacked images."""

    def __init__(self, cfg, action_size, terminates, device, compiled=False):
        super().__init__(cfg, device)
        self.encoder, self.prior = Encoder(cfg), GaussianActor(cfg, action_size)
        self.ema_policy = Policy(cfg, self.encoder, self.prior)
        self.prepare(encoder=cfg.actor_lr, prior=cfg.actor_lr)

    def update(self, batch):
        """One step of encoder and prior on a sampled batch -> metrics."""
        e, batch = self.encode_frames(batch)
        with self.autocast():
            loss, metrics = self.losses(e, batch)
        metrics |= self.step(loss, "encoder", "prior")
        self.ema_policy.update_ema(encoder=self.encoder, prior=self.prior)
        return as_numbers(metrics)

    def losses(self, e, batch):
        """e (B, T', E) of the stacked images, batch of (B, T', ...) -> loss, metrics."""
        behaviour = behaviour_loss(self.prior, e, batch["a"], batch["valid"])
        return behaviour, {"prior/behaviour_nll": behaviour}


class MOTO(BC):
    """The behaviour prior first; then world model, critics, actor, with one `update` for both
    phases. `compiled`: the model's loss goes through torch.compile (on a GPU with CUDA graphs)."""
    stages = 2

    def __init__(self, cfg, action_size, terminates, device, compiled=False):
        super().__init__(cfg, action_size, terminates, device)
        self.model, self.actor = WorldModel(cfg, action_size, terminates), Actor(cfg, action_size)
        self.critic = Critic(cfg, action_size, cfg.critics)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.ema_policy = Policy(cfg, self.encoder, self.prior, self.actor)
        self.prepare(encoder=cfg.actor_lr, prior=cfg.actor_lr, model=cfg.model_lr,
                     actor=cfg.actor_lr, critic=cfg.critic_lr)
        self.model_terms = lambda batch: model_loss(self.model, batch)       # what a compiler gets
        if compiled:
            torch._dynamo.config.suppress_errors = True  # eager where there is no working compiler
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.model_terms = torch.compile(self.model_terms, mode=mode)

    def update(self, batch):
        """One step of the prior, or, with features and decisions in the batch, of all the rest ->
        metrics. Raises FloatingPointError."""
        if "decisions" not in batch:
            return super().update(batch)
        cfg, batch = self.cfg, dict(batch)                # the caller's stays as it is
        decisions = batch.pop("decisions")
        torch.compiler.cudagraph_mark_step_begin()        # CUDA graphs reuse their memory from here
        with self.autocast():
            loss, metrics = self.model_terms(batch | {"x": to_image(batch["image"])})
        metrics |= self.step(loss, "model")
        u, mean = metrics["model/disagreement"], self.model.disagreement_mean
        mean.copy_(torch.where(mean == 0, u, torch.lerp(mean, u, 0.01)))
        # From here in float32: what a correction is worth is a small difference of large values.
        feat, decisions = self.filter(decisions)
        loss, more = self.critic_terms(feat, decisions)
        metrics |= more | self.step(loss, "critic")
        update_target(self.target, self.critic, cfg.target_rate)
        if self.episodes and self.failures >= cfg.warmup:     # SHARP: without failures Q flatters
            loss, more = self.actor_terms(decisions["e"][:, 0], cfg.beta / self.episodes)
            metrics |= more | self.step(loss, "actor")
            self.ema_policy.update_ema(actor=self.actor)
        return as_numbers(metrics)

    @torch.no_grad()
    def filter(self, decisions):
        """Of decisions (N, T, ...): the state after the last step, feat (N, F), and the last k + 1
        steps, dict of (N, k + 1, ...). Steps before them, if any, start the filter."""
        h, z, *_ = self.model.observe(*(decisions[name] for name in ("e", "a", "is_first")))
        last = {name: value[:, -self.cfg.hold - 1:] for name, value in decisions.items()}
        last["valid"] = decisions["valid"][:, -self.cfg.hold:]
        return torch.cat([h[:, -1], z[:, -1]], -1), last

    def actor_terms(self, e, weight):
        """Eq 14 at real features e (..., E) (DEPARTURE: no gradient through the model) -> loss,
        metrics, with the sizes of the two terms' gradients with respect to d."""
        d = self.actor(e)
        q = self.critic(e, self.ema_policy.effective(e, d))
        loss = actor_loss(q, d, weight)
        behaviour = 2 * weight * d.detach() / d.numel()
        value = torch.autograd.grad(loss, d, retain_graph=True)[0] - behaviour
        return loss, {"actor/value": q.mean().detach() / self.critic.unit,
                      "actor/correction": d.abs().mean().detach(),
                      "actor/value_gradient": value.norm(),
                      "actor/behaviour_gradient": behaviour.norm()}

    @torch.no_grad()
    def expand(self, feat, e):
        """Eq 6 to 9 from real steps: feat (N, F), e (N, E) -> V (H+1, N), what was imagined, and
        metrics."""
        cfg, model = self.cfg, self.model
        h, z = feat.split([cfg.deter, cfg.stoch], -1)
        imagined = imagine(model, self.ema_policy, self.actor, h, z, e, cfg.horizon, cfg.hold)
        reward, u = model.expected_reward(imagined["feat"][1:]), imagined["u"]
        penalized = penalised_reward(reward, u, cfg.alpha, model.disagreement_mean)
        discount = cfg.gamma * model.expected_continuation(imagined["feat"][1:])
        steps = [value.reshape(cfg.horizon, cfg.hold, len(e)).movedim(1, -1)
                 for value in (penalized, discount)]
        q = self.target.smaller_of_two(imagined["e"], imagined["d"])
        metrics = {"imagined/reward": reward.mean(), "imagined/disagreement": u.mean() /
                   model.disagreement_mean, "imagined/penalty": (reward - penalized).mean()}
        V = value_expansion(*accumulate(*steps), q, cfg.lam)
        return V, imagined, metrics if cfg.horizon else {}

    def critic_terms(self, feat, batch):
        """Eq 10 and 11 for N decisions, as from `filter`: feat (N, F) of the state after each, and
        dict of (N, k + 1, ...) -> loss, metrics."""
        cfg, unit, e = self.cfg, self.critic.unit, batch["e"]
        a, r, is_terminal = (batch[name][:, 1:] for name in ("a", "r", "is_terminal"))
        b = self.ema_policy.prior_action(e[:, :-1])
        d, reward, discount, weight = real_decisions(
            a, b, r, is_terminal, batch["valid"], cfg.bound, cfg.gamma)
        V, imagined, metrics = self.expand(feat, e[:, -1])
        y = critic_target(reward, discount, V[0])
        q = self.critic(e[:, 0], d)
        on_real = critic_loss(q, y, weight, unit)
        loss = (1 - cfg.imagined) * on_real
        metrics |= {"critic/real": on_real.detach(), "critic/q": q.mean().detach() / unit}
        if cfg.imagined:
            q = self.critic(imagined["e"][:-1], imagined["d"][:-1])
            on_imagined = critic_loss(q, V[:-1], torch.ones_like(V[:-1]), unit)
            loss = loss + cfg.imagined * on_imagined
            metrics["critic/imagined"] = on_imagined.detach()
        return loss, metrics

    def values(self, image):
        """The target critics' mean (L,) at an episode's first L images, times 1 - gamma."""
        policy, e = self.ema_policy, self.ema_policy.encode(image)
        return self.target(e, policy.effective(e, policy.actor(e))).mean(0) / self.target.unit

    def value_estimate(self, image):
        """The value at an episode's first image (P, P, 3)."""
        return float(self.values(image[None]))


AGENTS = {"bc": BC}                                       # every other variant: MOTO


def make_agent(cfg, action_size, terminates, device, compiled=False):
    return AGENTS.get(cfg.variant, MOTO)(cfg, action_size, terminates, device, compiled)


# ---- Episodes and replay -------------------------------------------------------------------------
# README has the layout of an episode's file; action[i] leads from image[i] to image[i+1].

@contextlib.contextmanager
def explained(what, remedy, *kinds):
    """Makes a UserError of an error of these kinds: what went wrong, the error, and the remedy."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what} ({type(error).__name__}: {error}); {remedy}") from None


def writing(path):
    """Makes a UserError of a full or unwritable disk; torch.save's is a RuntimeError."""
    return explained(f"cannot write {path}", "free some disk space or choose a writable folder, "
                     "and repeat the command: what was saved before is intact",
                     OSError, RuntimeError)


def write_atomically(path, write):
    """write(file) to a temporary neighbour of `path`, fsync, rename: readers see all or nothing."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path, value):
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts, without a half-written last one; [] without a file."""
    rows = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError), open(path) as file:
        for line in file:
            rows.append(json.loads(line))
    return rows


def save_episode(path, image, action, reward, terminal=False):
    """Write one episode, compressed."""
    write_atomically(path, lambda file: np.savez_compressed(
        file, image=np.asarray(image, np.uint8), action=np.asarray(action, np.float32),
        reward=np.asarray(reward, np.float32), terminal=bool(terminal)))


def load_episode(path, image_size, action_size):
    """One .npz episode, checked -> dict of image, action, reward, terminal. Raises UserError."""
    with explained(f"{path} cannot be read as an episode", "it has plain arrays image, action, "
                   "reward: correct or remove it", Exception):
        with np.load(path, allow_pickle=False) as file:
            episode = {name: file[name] for name in ("image", "action", "reward")}
            episode["terminal"] = np.squeeze(file.get("terminal", False))
    L, P, numbers = episode["reward"].size, image_size, ("float", "int", "uint", "bool")
    for name, wanted, kinds, shape, limit in (
            ("reward", "finite numbers, at least one step", numbers, (L,), 3e38),
            ("action", "floating point, finite and in [-1, 1]", "float", (L, action_size), 1.001),
            ("image", "uint8, one more than rewards", "uint8", (L + 1, P, P, 3), 256),
            ("terminal", "one bool", numbers, (), np.inf)):
        array = episode[name]
        fits = L and array.dtype.name.startswith(kinds) and array.shape == shape
        if not (fits and (abs(array) < limit).all()):
            found = f"of size {abs(array).max():g}" if fits else f"{array.dtype} {array.shape}"
            raise UserError(f"{path}: {name} must be {wanted}, of shape {shape}, but is {found}; "
                            "correct the file or remove it")
    return {"image": episode["image"], "action": episode["action"].astype(np.float32),
            "reward": episode["reward"].astype(np.float32), "terminal": bool(episode["terminal"])}


class Replay:
    """Episodes laid end to end in flat tensors, on the device that learns: a sequence is a slice.

    One may run over an episode boundary, which `is_first` marks and every loss respects. `starts`:
    where sequences may begin, for the offline and the online part of a batch."""

    def __init__(self, capacity, image_size, action_size, device="cpu"):
        self.size, self.device = 0, device
        self.starts = {part: np.zeros(0, int) for part in ("offline", "online")}
        kinds = {"image": ((image_size, image_size, 3), np.uint8),
                 "a": ((action_size,), np.float32), "r": ((), np.float32),
                 "is_terminal": ((), np.float32), "is_first": ((), bool)}
        self.data = {name: torch.from_numpy(np.zeros((capacity, *shape), kind)).to(device)
                     for name, (shape, kind) in kinds.items()}   # memory is used as it is filled

    def add(self, episode, part="offline"):
        """Append an episode (dict as from load_episode) with this file's time index."""
        start, end = self.size, self.size + len(episode["image"])
        self.data["image"][start:end] = torch.as_tensor(episode["image"])
        self.data["a"][start + 1:end] = torch.as_tensor(episode["action"])
        self.data["r"][start + 1:end] = torch.as_tensor(episode["reward"])
        self.data["is_first"][start] = True
        self.data["is_terminal"][end - 1] = episode["terminal"]
        self.starts[part] = np.append(self.starts[part], np.arange(start, end))
        self.size = end

    def encode(self, policy):
        """Add the features of all steps that have none, as `e`. The encoder is constant by then."""
        if "e" not in self.data:
            shape = len(self.data["r"]), policy.cfg.hidden
            self.encoded, self.data["e"] = 0, torch.zeros(shape, device=self.device)
        starts = self.data["is_first"][self.encoded:self.size].nonzero()[:, 0] + self.encoded
        for start, end in zip(starts, [*starts[1:], self.size]):
            self.data["e"][start:end] = policy.encode(self.data["image"][start:end])
        self.encoded = self.size

    def sample(self, rng, count, length, part="offline", without=()):
        """`count` sequences -> dict of (count, length, ...), but for what is named `without`; and
        `valid` (count, length - 1): one where a_{t+1} leaves s_t, zero between two episodes."""
        at = self.starts[part][rng.integers(0, self.choices(part, length), size=count)]
        at = torch.from_numpy(at[:, None] + np.arange(length)).to(self.device)
        batch = {name: values[at] for name, values in self.data.items() if name not in without}
        return batch | {"valid": (~batch["is_first"][:, 1:]).float()}

    def choices(self, part, length):
        """How many sequences of `length` steps a part has; `starts` ascends."""
        return int(np.searchsorted(self.starts[part], self.size - length, "right"))


def sample_batch(cfg, rng, replay):
    """B sequences of T steps: all offline before there is online data, then `offline_fraction` of
    them. Once the replay has features: of T' steps, and DECISIONS B `decisions` of k + 1 steps, at
    least 9 (fewer in a short sequence): any before the last k + 1 start the filter."""
    def draw(count, length, without=()):
        offline = round(cfg.offline_fraction * count) if replay.choices("online", length) else count
        parts = [replay.sample(rng, number, length, part, without) for part, number in
                 (("offline", offline), ("online", count - offline)) if number]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if "e" not in replay.data:
        return draw(cfg.batch, cfg.length)
    length = min(cfg.length, max(cfg.hold, 8) + 1)
    return draw(cfg.batch, cfg.length - FRAMES + 1) | {
        "decisions": draw(DECISIONS * cfg.batch, length, without=["image"])}


# ---- Environments and offline data ---------------------------------------------------------------
# An environment has action_size, terminates, describe() -> dict, reset(seed) -> image, close(), and
# step(a) -> image, reward, terminal (the task ended), over (it ended or ran out of time), success.
# One that can demonstrate has also scripted_action(), demonstrated (the script's aim is reached),
# and max_demo_reward (the largest reward that a demonstration may contain). It may have
# score(rewards) -> dict, beside the success rate, and draw(run, path) -> dict, its own picture.

def extra(name):
    """The module experiments/<name>.py; a run's folder has a copy beside its moto.py."""
    here = Path(__file__).resolve().parent
    if name not in sys.modules:
        sys.path[:0] = [str(here / "experiments"), str(here)]
    with explained(f"cannot import {name}", "moto.py needs experiments/ beside it, and "
                   "requirements.txt installed", ModuleNotFoundError):
        return importlib.import_module(name)


def make_env(cfg):
    """The task's environment, from experiments/."""
    if cfg.task.startswith("gym:"):
        return extra("gym_task").GymTask(cfg)
    if cfg.task in KITCHENS:
        return extra("franka_kitchen").Kitchen(cfg)
    return extra("meta_world").MetaWorld(cfg)


def episode_seed(cfg, stream, index):
    """Seeds of demonstrations, online episodes and evaluations: three streams that never meet."""
    return [cfg.seed, ("demos", "online", "evaluation").index(stream), index]


def offline_paths(cfg, workers):
    """The offline episodes: the user's folder, a Minari data set, or scripted demonstrations."""
    if not cfg.data:
        return extra("demonstrations").collect_demos(cfg, workers)
    if cfg.data.startswith("minari:"):
        return extra("franka_kitchen").render_minari(cfg, workers)
    paths = sorted(Path(cfg.data).glob("*.npz"))
    if not paths:
        raise UserError(f"there is no folder {cfg.data} with .npz episodes; correct --data")
    return paths


# ---- Rollout and evaluation ----------------------------------------------------------------------

def rollout(cfg, env, policy, seed, sample=False):
    """One episode -> dict of image, action, reward, terminal as on disk, and success (at any step).
    `sample`: with noise, from a generator of the episode's own; else mean actions."""
    own = int(np.random.SeedSequence(seed).generate_state(1)[0])
    generator = torch.Generator().manual_seed(own) if sample else None
    image, carried = env.reset(seed), None
    episode = {"image": [image], "action": [], "reward": [], "terminal": False, "success": False}
    for _ in range(cfg.episode_steps):
        a, carried = policy.act(image, carried, generator)
        image, reward, episode["terminal"], over, success = env.step(a)
        for name, value in (("image", image), ("action", a), ("reward", reward)):
            episode[name].append(value)
        episode["success"] |= success
        exit_if_asked()
        if over:                                          # SHARP: over, not terminal: time limit
            break
    return episode


def evaluate(cfg, workers, agent, episodes, first=0):
    """Episodes `first`, first + 1, ... of the evaluation stream, on which nothing is ever trained
    -> (result, the first four of them).

    result: `success`, the share of episodes with any successful step; `episodes`; and, in units of
    1 / (1 - gamma), `return`, the discounted rewards to the time limit; `infinite_horizon_return`,
    as if the last went on for ever; `value_estimate` of that by the critics at the first image."""
    rows, values, rewards, videos, gamma = [], [], [], [], cfg.gamma
    seeds = [episode_seed(cfg, "evaluation", first + index) for index in range(episodes)]
    played = workers.play(agent.ema_policy, seeds)
    for episode in tqdm(played, total=episodes, desc="evaluation", leave=False):
        reward = episode["reward"]
        discounted = (1 - gamma) * sum(gamma ** t * r for t, r in enumerate(reward))
        beyond = 0.0 if episode["terminal"] else gamma ** len(reward) * reward[-1]
        rows.append((episode["success"], discounted, discounted + beyond))
        rewards.append(reward)
        if agent.value_estimate:
            values.append(agent.value_estimate(episode["image"][0]))
        videos = (videos + [episode])[:4]
        exit_if_asked()
    names = "success", "return", "infinite_horizon_return"
    result = dict(zip(names, np.mean(rows, 0).tolist()))
    if values:
        result["value_estimate"] = float(np.mean(values))
    if hasattr(workers.env, "score"):
        result |= workers.env.score(rewards)
    return result | {"episodes": episodes}, videos


def cores():
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---- A run: its folder, its state, its checkpoint ------------------------------------------------

MAY_CHANGE = {"logdir", "device", "cache", "data", "online_episodes", "eval_every", "log_every",
              "save_every", "final_episodes", "precision", "workers"}  # on resuming


def differences(then, now, besides=MAY_CHANGE):
    """What differs between two configs (dicts) -> {name: both values}."""
    pairs = {name: (then.get(name, "nothing"), now.get(name, "nothing"))
             for name in {**then, **now} if name not in besides}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def planned_updates(cfg):
    """Those of all offline stages, and U per online episode."""
    return planned_offline(cfg) + cfg.online_episodes * cfg.updates_per_episode


def planned_offline(cfg):
    """N for every stage that the agent has."""
    return AGENTS.get(cfg.variant, MOTO).stages * cfg.offline_updates


class Run:
    """One run: config, environment, agent, data, counters, metrics, and the checkpoint that holds
    them. `acting`: only what acts is read, from agent.pt, and nothing in the folder is changed."""

    def __init__(self, cfg, acting=False):
        self.cfg, self.dir, self.videos = cfg, Path(cfg.logdir), None
        self.state = {"updates": 0, "episodes": 0, "failures": 0, "env_steps": 0, "seconds": {},
                      "scores": {}, "pending": [], "logged": 0}
        started = time.perf_counter()
        checkpoint = None if acting else self.read_checkpoint()
        self.env = make_env(cfg)
        compiled = cfg.device.startswith("cuda")          # on a CPU it takes minutes and saves 12 %
        sizes = self.env.action_size, self.env.terminates
        self.agent = make_agent(cfg, *sizes, cfg.device, compiled)
        self.rng = np.random.default_rng(cfg.seed)
        if acting:
            self.load_agent()
        if checkpoint:
            self.restore(checkpoint)
        self.workers = extra("rollout_workers").RolloutWorkers(cfg, self.env)
        self.clock("start", started)

    def clock(self, stage, started):
        """Add the time since `started` to a stage's seconds."""
        seconds = self.state["seconds"]
        seconds[stage] = seconds.get(stage, 0) + time.perf_counter() - started

    def save(self):
        """Write checkpoint.pt, then agent.pt: what acts, small."""
        checkpoint = {"config": dataclasses.asdict(self.cfg), "agent": self.agent.state_dict(),
                      "state": self.state, "torch_rng": torch.get_rng_state(),
                      "numpy_rng": json.dumps(self.rng.bit_generator.state)}
        if self.agent.device.type == "cuda":
            checkpoint["cuda_rng"] = torch.cuda.get_rng_state(self.agent.device)
        agent = {"updates": self.state["updates"], "modules": self.agent.acting_state()}
        for name, value in ("checkpoint.pt", checkpoint), ("agent.pt", agent):
            write_atomically(self.dir / name, lambda file, value=value: torch.save(value, file))

    def read_checkpoint(self):
        """The checkpoint, weights only, or None without a run. Raises UserError if it is unfit."""
        rows = read_metrics(self.dir / "metrics.jsonl")
        scored = any(row.get("evaluation") == "offline" for row in rows)
        if not (scored or [*self.dir.glob("*.pt")]):
            return None
        with explained(f"the run in {self.dir} cannot be continued without its checkpoint",
                       "choose another --logdir or remove the folder", Exception):
            checkpoint = torch.load(self.dir / "checkpoint.pt", "cpu", weights_only=True)
            config, done = checkpoint["config"], checkpoint["state"]["updates"]
        if changed := differences(config, dataclasses.asdict(self.cfg)):
            listed = "; ".join(f"{name} ({there} there, {here} now)"
                               for name, (there, here) in changed.items())
            raise UserError(f"{self.dir} has another config: {listed}; repeat its flags, choose "
                            "another --logdir, or use the moto.py there")
        if done > (planned := planned_updates(self.cfg)):
            raise UserError(f"{self.dir} has {done} updates, more than the {planned} of this "
                            "budget; repeat its --online-episodes or more")
        return checkpoint

    def restore(self, checkpoint):
        """Set everything to where the checkpoint left it."""
        with explained(f"the checkpoint in {self.dir} does not fit this program", "use the moto.py "
                       "in that folder or choose another --logdir", Exception):
            self.agent.load_state_dict(checkpoint["agent"])
            self.state = {name: checkpoint["state"][name] for name in [*self.state, "data"]}
            self.rng.bit_generator.state = json.loads(checkpoint["numpy_rng"])
            torch.set_rng_state(checkpoint["torch_rng"])
            if self.agent.device.type == "cuda" and "cuda_rng" in checkpoint:
                torch.cuda.set_rng_state(checkpoint["cuda_rng"], self.agent.device)

    def load_agent(self):
        """Set what acts from agent.pt."""
        with explained(f"the agent in {self.dir} cannot be used", "train until the first "
                       "checkpoint, or use the moto.py in that folder", Exception):
            agent = torch.load(self.dir / "agent.pt", "cpu", weights_only=True)
            self.agent.load_acting(agent["modules"])
            self.state["updates"] = agent["updates"]

    def load(self, path):
        """A saved episode. Raises UserError on one that is not of this task."""
        episode = load_episode(path, self.cfg.image_size, self.env.action_size)
        if self.cfg.reward_head == "bernoulli" and not np.isin(episode["reward"], (0, 1)).all():
            raise UserError(f"{path}: a reward is neither 0 nor 1; use --reward-head normal")
        return episode

    def open_data(self):
        """Bring offline and, on resuming, online episodes into memory. Raises UserError."""
        cfg, started = self.cfg, time.perf_counter()
        episodes = [self.load(path) for path in offline_paths(cfg, self.workers)]
        steps = sum(len(episode["image"]) for episode in episodes)
        most = max(cfg.online_episodes, self.state["episodes"])        # one may be ahead
        capacity = steps + most * (cfg.episode_steps + 1)
        with explained(f"no room for a replay of {capacity:,} steps", "lower --online-episodes or "
                       "--image-size", MemoryError, torch.OutOfMemoryError):
            self.replay = Replay(capacity, cfg.image_size, self.env.action_size, cfg.device)
        digest = hashlib.sha256()
        for episode in episodes:
            self.replay.add(episode)
            for name in ("image", "action", "reward", "terminal"):
                digest.update(np.ascontiguousarray(episode[name]))
        if steps < cfg.length:
            raise UserError(f"the offline data has {steps} steps, fewer than one sequence; lower "
                            "--length")
        if self.state.setdefault("data", digest.hexdigest()) != digest.hexdigest():
            raise UserError(f"the offline data is not what {self.dir} began with; give its --data "
                            "or --cache, or choose another --logdir")
        for index in range(self.state["episodes"]):
            self.replay.add(self.load(self.episode_path(index)), "online")
        self.clock("demonstrations", started)

    def episode_path(self, index):
        return self.dir / "episodes" / f"{index:05d}.npz"

    def close(self):
        self.workers.close()
        self.env.close()

    def describe(self):
        """Write config.json, and copies of the source: this, the agent's, experiments/ in use."""
        extra("pictures")                    # in use at the end: kept, and if missing, missed now
        versions = {"python": sys.version, "torch": torch.__version__, "numpy": np.__version__}
        write_json(self.dir / "config.json", {
            "config": dataclasses.asdict(self.cfg), "environment": self.env.describe(),
            "versions": versions, "cores": cores(),
            "gpus": [*map(torch.cuda.get_device_name, range(torch.cuda.device_count()))]})
        needed = sys.modules["moto"], inspect.getmodule(type(self.agent))
        for module in [*sys.modules.values()]:
            file = Path(getattr(module, "__file__", None) or "")
            if file.parent.name == "experiments" or module in needed and file.is_file():
                write_atomically(self.dir / file.name, lambda out: out.write(file.read_bytes()))

    def log(self, row):
        """Append a line to metrics.jsonl, over what was logged after the last checkpoint."""
        counters = {name: self.state[name] for name in ("updates", "env_steps")}
        row = counters | {"seconds": round(sum(self.state["seconds"].values()), 2)} | row
        path = self.dir / "metrics.jsonl"
        with writing(path), open(path, "ab") as file:
            file.truncate(min(file.tell(), self.state["logged"]))
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(row).encode() + b"\n")
            self.state["logged"] = file.tell()

    def update(self, bar, stage):
        """The update of both phases: sample, learn, count, log, save, and stop here if asked."""
        cfg, started, n = self.cfg, time.perf_counter(), self.state["updates"] + 1
        self.agent.episodes, self.agent.failures = self.state["episodes"], self.state["failures"]
        if n > cfg.offline_updates and self.agent.stages == 2:
            self.replay.encode(self.agent.ema_policy)
        with explained(f"learning failed at update {n}", "lower --model-lr, --actor-lr and "
                       "--critic-lr or use --precision float32", FloatingPointError):
            metrics = self.agent.update(sample_batch(cfg, self.rng, self.replay))
        self.state["updates"] = n
        self.clock(stage, started)
        pending = self.state["pending"]
        pending.append(metrics)
        if n % cfg.log_every == 0:
            self.log({name: float(np.mean([m[name] for m in pending if name in m]))
                      for name in dict.fromkeys(name for m in pending for name in m)})
            pending.clear()
            shown = sorted({"model/image", "critic/q", "prior/behaviour_nll"} & metrics.keys())
            bar.set_postfix({name.split("/")[1]: f"{metrics[name]:.3g}" for name in shown})
        if n % cfg.save_every == 0:
            self.save()
        bar.update()
        exit_if_asked()

    def score(self, name, episodes):
        """Evaluate once under this name (a resumed run does not repeat it) and log the result."""
        if self.state["scores"].get(name, {}).get("episodes") != episodes:
            started = time.perf_counter()
            result, self.videos = evaluate(self.cfg, self.workers, self.agent, episodes)
            self.clock("evaluation", started)
            self.state["scores"][name] = result
            self.log({"evaluation": name} | {f"evaluation/{k}": v for k, v in result.items()})

    def score_on_the_way(self):
        n = self.state["updates"]
        constant = self.cfg.offline_updates <= n <= planned_offline(self.cfg)
        if n and n % self.cfg.eval_every == 0 and not constant:
            self.score(f"update {n}", max(1, self.cfg.final_episodes // 5))


# ---- The two loops -------------------------------------------------------------------------------

def collect_online(run):
    """Play one episode, save it, and add it to the replay; every second one without noise. SHARP:
    noise pushes the hand out of where mean actions leave it waiting. Critics of noisy decisions
    alone count on the push: drawer-open succeeded in 13 of 15 with noise, 32 of 50 without."""
    cfg, state, started, index = run.cfg, run.state, time.perf_counter(), run.state["episodes"]
    seed = episode_seed(cfg, "online", index)
    episode = rollout(cfg, run.env, run.agent.ema_policy, seed, sample=index % 2 == 0)
    success = episode.pop("success")
    save_episode(run.episode_path(index), **episode)
    run.replay.add(run.load(run.episode_path(index)), "online")
    state["episodes"] += 1
    state["failures"] += not success
    state["env_steps"] += len(episode["action"])
    run.clock("acting", started)
    run.log({"episode": index, "episode/success": float(success),
             "episode/return": sum(episode["reward"])})


def pretrain(run):
    """Offline: updates on the static data alone, then the offline score."""
    state, offline = run.state, planned_offline(run.cfg)
    with tqdm(total=offline, initial=min(state["updates"], offline), desc="offline") as bar:
        while state["updates"] < offline:
            run.score_on_the_way()
            run.update(bar, "offline")
    if state["updates"] == offline:
        run.save()                                        # a score has a checkpoint beside it
        run.score("offline", run.cfg.final_episodes)
        run.save()


def finetune(run):
    """Online: one episode with the present policy, then U updates on old and new data together;
    again. Ends with the final score; without online episodes that is the offline score."""
    cfg, state = run.cfg, run.state
    offline, end = planned_offline(cfg), planned_updates(cfg)
    with tqdm(total=end - offline, initial=state["updates"] - offline, desc="online",
              disable=end == offline) as bar:
        while state["updates"] < end:
            state["scores"].pop("final", None)                         # of a run that was shorter
            run.score_on_the_way()
            if state["updates"] == offline + state["episodes"] * cfg.updates_per_episode:
                collect_online(run)
            run.update(bar, "online")
    if end == offline:
        state["scores"]["final"] = state["scores"]["offline"]
    run.score("final", cfg.final_episodes)
    run.save()


# ---- Command line --------------------------------------------------------------------------------

def nearest(name, known):
    """A hint for an error message: the names nearest to a wrong one, or all of them."""
    near = difflib.get_close_matches(name, known, 3, 0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"


def add_config_flags(parser):
    """Give an argparse parser, of argument_default SUPPRESS, one flag per field of Config."""
    parser.epilog = ("Defaults are those of the preset laptop; PRESETS, TASKS and VARIANTS in "
                     f"moto.py change some. Variants: {', '.join(VARIANTS)}.")
    for f in dataclasses.fields(Config):
        allowed = f", in {f.metadata['allowed']}" if f.metadata["allowed"] else ""
        text = f"{f.metadata['help']} (default: {f.default!r}{allowed})".replace("%", "%%")
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=text, type=f.type,
                            metavar=f.type.__name__.upper())


def parse(argv):
    """Words of a command line -> dict of the flags that are given. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="moto.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        usage="moto.py [--FLAG VALUE ...] | --evaluate LOGDIR [--episodes N] [--workers N] "
        "[--device D]", description=__doc__.split("\n\n")[0])
    parser.add_argument("--evaluate", metavar="LOGDIR", help="score an agent on new episodes")
    parser.add_argument("--episodes", type=int, metavar="N", help="how many, with --evaluate")
    add_config_flags(parser)
    given = vars(parser.parse_args(argv))
    command, unused = "training", given.keys() & {"episodes"}
    if "evaluate" in given:
        command, unused = "--evaluate", given.keys() - {"evaluate", "episodes", "workers", "device"}
    for name in unused:
        raise UserError(f"--{name.replace('_', '-')} is not used by {command}; leave it out")
    if given.get("episodes", 1) < 1:
        raise UserError(f"--episodes is {given['episodes']} but must be at least 1")
    return given


def build_config(**given):
    """Config: given values over variant, task, preset, defaults. Raises UserError."""
    if given.get("variant") in BASELINES and given["variant"] not in VARIANTS:
        raise UserError(f"the variant {given['variant']} lives in experiments/baselines.py; repeat "
                        "the command with python experiments/baselines.py in place of moto.py")
    for name, known in (("preset", ["auto", *PRESETS]), ("variant", [*VARIANTS])):
        if given.setdefault(name, known[0]) not in known:
            raise UserError(f"unknown {name} {given[name]!r}; {nearest(given[name], known)}")
    if given.get("device", "auto") == "auto":
        given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = given["device"].startswith("cuda")
    if given["preset"] == "auto":
        given["preset"] = "paper" if gpu else "laptop"
    task = TASKS[given["preset"]].get(given.get("task"), {})
    cfg = Config(**(PRESETS[given["preset"]] | task | VARIANTS[given["variant"]] | given))
    cfg.workers = cfg.workers or min(8, cores())
    if cfg.reward_head == "auto":
        cfg.reward_head = "normal" if cfg.task.startswith(("gym:", "kitchen-")) else "bernoulli"
    cfg.logdir = cfg.logdir or f"runs/{run_name(cfg.task, cfg.variant, cfg.seed)}"
    for name in ("logdir", "data", "cache"):
        setattr(cfg, name, os.path.expanduser(getattr(cfg, name)))
    if cfg.precision == "auto":
        cfg.precision = "bfloat16" if gpu or bfloat16_pays() else "float32"
        with contextlib.suppress(OSError, ValueError, KeyError):       # a run keeps its own
            saved = json.loads((Path(cfg.logdir) / "config.json").read_text())
            cfg.precision = saved["config"]["precision"]
    check_config(cfg)
    return cfg


@functools.cache
def bfloat16_pays():
    """Whether this processor multiplies matrices clearly faster in bfloat16 than in float32, by a
    trial of a tenth of a second: some have the instructions and are slower with them."""
    def seconds(kind):
        square = torch.ones(512, 512, dtype=kind)
        return min(timeit.repeat(lambda: square @ square, number=1, repeat=9))
    return seconds(torch.float32) > 1.3 * seconds(torch.bfloat16)


def run_name(task, variant, seed):
    """The name of a run's folder."""
    return f"{task.replace(':', '-').replace('/', '-')}-{variant}-seed{seed}"


def within(value, interval):
    """Whether a number lies in an interval such as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    bounds = [low] * (interval[0] == "[") + [high] * (interval[-1] == "]")
    return low < value < high or value in bounds


def check_config(cfg):
    """Raise UserError on a value that cannot work, naming the flag."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    names = {"precision": ["float32", "bfloat16"], "reward_head": ["bernoulli", "normal"],
             "device": ["cpu", "cuda", *gpus] if gpus else ["cpu"]}
    for f in dataclasses.fields(cfg):
        value, allowed, rule = getattr(cfg, f.name), f.metadata["allowed"], ""
        if f.name in names and value not in names[f.name]:
            rule = f"one of {', '.join(names[f.name])}"
        elif allowed and not within(value, allowed):
            rule = f"in {allowed}"
        elif f.name == "image_size" and value % 16:
            rule = "a multiple of 16"
        elif f.name == "imagined" and value and not (cfg.horizon and cfg.lam):
            rule = "0 without --horizon and --lam"
        elif f.name == "beta" and not value and cfg.bound < 1:
            rule = "above 0, or --bound at least 1: without it the correction is the action"
        elif f.name == "length" and value < cfg.hold + FRAMES:
            rule = f"at least {cfg.hold + FRAMES}: --hold + {FRAMES} images"
        if rule:
            raise UserError(f"--{f.name.replace('_', '-')} is {value!r} but must be {rule}")


def lock(folder):
    """An open file that keeps other processes from training in this folder. Raises UserError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")
    with contextlib.suppress(ImportError, OSError):       # Windows; file systems without locks
        import fcntl
        with explained(f"another process is training in {folder}",
                       "wait for it, or choose another --logdir", BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def finish(run):
    """result.json of a finished run, then its pictures."""
    cfg, state = run.cfg, run.state
    result = {name: getattr(cfg, name) for name in ("task", "variant", "seed", "preset", "device")}
    result |= {f"{phase}_{key}": value for phase in ("offline", "final")
               for key, value in state["scores"][phase].items() if key != "episodes"}
    seconds = {stage: round(value, 1) for stage, value in state["seconds"].items()}
    total = round(sum(seconds.values()), 1)
    result |= {"eval_episodes": state["scores"]["final"]["episodes"], "updates": state["updates"],
               "env_steps": state["env_steps"], "wall_seconds": seconds | {"total": total}}
    write_json(run.dir / "result.json", result)
    print(f"success offline {result['offline_success']:.0%}, final {result['final_success']:.0%} "
          f"(over {result['eval_episodes']} fresh episodes) in {total / 60:.1f} minutes; pictures "
          f"and weights: {run.dir}")
    extra("pictures").draw_run(run)


def train(cfg):
    """The main job: demonstrations, pretrain, finetune, result.json, pictures."""
    with lock(Path(cfg.logdir)), contextlib.closing(Run(cfg)) as run:
        print(f"{cfg.task}, {cfg.variant}, seed {cfg.seed}, preset {cfg.preset}, {cfg.device}, "
              f"{cfg.precision} -> {run.dir}, from update {run.state['updates']} on")
        run.open_data()
        run.describe()
        try:
            pretrain(run)
            finetune(run)
        except (Stopped, EpisodeError):
            run.save()
            raise
        finish(run)


def open_run(logdir, **given):
    """The run in a folder with config.json and agent.pt, as far as it acts. Raises UserError."""
    logdir = os.path.expanduser(logdir)
    with explained(f"{logdir} is no run folder", "--evaluate takes a run's --logdir", Exception):
        config = json.loads((Path(logdir) / "config.json").read_text())["config"]
    if other := config.keys() ^ vars(Config()).keys():
        raise UserError(f"{logdir} was made by another version of this program, with or without "
                        f"{', '.join(sorted(other))}; use the moto.py in that folder")
    here = {"logdir": logdir, "device": "auto", "workers": min(config["workers"], cores())}
    return Run(build_config(**config | here | given), acting=True)


def evaluate_run(logdir, episodes=None, **given):
    """--evaluate: score the agent in a run's folder on episodes no run has seen, print JSON; write
    evaluate.gif and, for Franka Kitchen, evaluate-combination.png."""
    with contextlib.closing(open_run(logdir, **given)) as run:
        cfg, episodes = run.cfg, episodes or run.cfg.final_episodes
        result, videos = evaluate(cfg, run.workers, run.agent, episodes, first=10_000)
        result |= extra("pictures").draw_evaluation(run, videos)
    print(json.dumps({"task": cfg.task, "variant": cfg.variant, "seed": cfg.seed,
                      "updates": run.state["updates"]} | result))


def exit_code(command, argv=None):
    """Run command(argv) -> the exit code: 0 done, 2 after a UserError, 130 / 143 stopped after
    Ctrl-C / SIGTERM. These wait for the next step boundary; a second one does not."""
    stop_requested["signal"] = None

    def note(number, frame):
        if stop_requested["signal"]:
            raise KeyboardInterrupt
        stop_requested["signal"] = number
        os.write(2, b"\nmoto: stopping after this step; Ctrl-C again: at once\n")    # no print here
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        command(argv)
        sys.stdout.flush()
    except UserError as trouble:
        print(f"moto: {trouble}", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt):
        print("moto: stopped; repeat the command to continue", file=sys.stderr)
        return 128 + (stop_requested["signal"] or signal.SIGINT)
    except BrokenPipeError:                                            # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def train_or_evaluate(argv):
    """The two commands of this file. Raises UserError."""
    given = parse(argv)
    if "evaluate" in given:
        evaluate_run(given.pop("evaluate"), **given)
    else:
        train(build_config(**given))


def main(argv=None):
    """The command line; returns the exit code."""
    return exit_code(train_or_evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
