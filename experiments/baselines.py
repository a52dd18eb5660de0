"""IQL, CQL and SAC from pixels, the paper's model-free baselines, beside moto.py.

    python experiments/baselines.py --task drawer-open --variant iql         # or cql, or sac
    python experiments/baselines.py --evaluate runs/drawer-open-iql-seed0
    python experiments/reproduce.py --tasks drawer-open --variants iql cql sac --seeds 0 1 2

Every command and flag of moto.py works here, and so do its own variants. Each class below is an
agent with the interface of moto.MOTO: `update(batch)` -> metrics, `ema_policy`, the policy that
plays episodes, and `value_estimate(image)` at an episode's first image. Its actor is the
behaviour prior's network, beside two critics, on an encoder of stacked images. As with MOTO, every
second online episode is played by mean actions. The lines at the end add them to moto.py: an
algorithm of your own is added in the same way.

Axes and letters as in moto.py. T' = T - frames + 1: steps whose stack of images is complete.
"""
import contextlib
import copy
import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import moto


@contextlib.contextmanager
def frozen(*modules):
    """Inside, these modules pass gradients on to their inputs but collect none for their
    parameters. A parameter that was frozen before stays frozen afterwards."""
    learning = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def expectile_loss(error, expectile, weight):
    """|tau - 1(error < 0)| error^2, weighted mean, tau = expectile: 1/2 is half the mean square.
    Source: Kostrikov et al. 2021 (IQL)."""
    return moto.weighted_mean((expectile - (error < 0).float()).abs() * error.square(), weight)


class ModelFree(moto.Agent):
    """What the agents below share: one step of all losses, and how they judge a start."""

    def update(self, batch):
        """One step of everything on a sampled batch -> metrics."""
        feat, batch = self.encode_frames(batch)
        with self.autocast():
            loss, metrics = self.losses(feat, batch)
        metrics |= self.step(loss, *self.optimisers)
        self.ema_policy.update_ema(encoder=self.encoder, prior=self.actor)
        moto.update_target(self.target, self.critic, self.cfg.target_rate)
        return moto.as_numbers(metrics)

    @torch.no_grad()
    def value_estimate(self, image):
        """The critics' value estimate at an episode's first image (P, P, 3), times 1 - gamma."""
        feat = self.ema_policy.encode(image[None])
        a = self.ema_policy.prior(feat).mode
        return float(self.target(feat, a).min() / self.target.unit)


class IQL(ModelFree):
    """Implicit Q-learning: no action outside the data is ever asked for its value.

        V: expectile regression of Q(s, a) on the data;   Q(s, a) -> r + gamma V(s')
        actor: maximise exp(temperature (Q - V)) ln pi(a|s), the weight at most 100

    All three losses train the encoder, at the actor's rate: at three times that, the large weights
    of the first updates drove its tanh into saturation, and the policy ignored the images (0
    instead of 95 % offline). Source: Kostrikov et al. 2021.
    """
    expectile, temperature = 0.5, 3.0                      # IQL's own: 0.7 to 0.9, and 3

    def __init__(self, cfg, action_size, terminates, device, compiled=False):
        super().__init__(cfg, device)
        self.encoder = moto.Encoder(cfg)
        self.actor = moto.GaussianActor(cfg, action_size)
        self.ema_policy = moto.Policy(cfg, self.encoder, self.actor)
        self.critic = moto.Critic(cfg, action_size)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = moto.mlp(cfg.hidden, cfg.hidden, 1)
        self.prepare(encoder=cfg.actor_lr, actor=cfg.actor_lr, critic=cfg.critic_lr,
                     value=cfg.critic_lr)

    def losses(self, feat, batch):
        """feat (B, T', E) of the stacked images, batch of (B, T', ...) -> loss, metrics."""
        cfg, a, valid, unit = self.cfg, batch["a"][:, 1:], batch["valid"], self.critic.unit
        q = self.target(feat[:, :-1].detach(), a).min(0).values
        V = unit * self.value(feat).float().squeeze(-1)
        advantage = q - V[:, :-1]
        value = expectile_loss(advantage / unit, self.expectile, valid)
        discount = cfg.gamma * (1 - batch["is_terminal"][:, 1:])
        y = moto.critic_target(batch["r"][:, 1:], discount, V[:, 1:])
        critic = moto.critic_loss(self.critic(feat[:, :-1], a), y, valid, unit)
        advantage_weight = (self.temperature * advantage.detach()).exp().clamp(max=100)
        nll = moto.action_nll(self.actor, feat, batch["a"])
        actor = moto.weighted_mean(advantage_weight * nll, valid)
        return value + critic + actor, {
            "actor/behaviour_nll": moto.weighted_mean(nll, valid),
            "critic/real": critic, "critic/value": value, "actor/value": V.mean() / unit,
            "actor/weight": moto.weighted_mean(advantage_weight, valid)}


class CQL(ModelFree):
    """Conservative Q-learning on soft actor-critic; with weight 0 it is soft actor-critic itself.

        Q(s, a) -> r + gamma (min Q(s', a') - tau ln pi(a'|s')),  a' ~ pi    plus, for each critic,
        cql_weight * E[ln integral of exp Q(s, .) - Q(s, a)]: actions of the data above all others
        actor: maximise min Q(s, a) - tau ln pi(a|s);   tau such that the entropy nears -A

    The integral is estimated from ten uniform actions, ten of pi at s and ten of pi at s', each
    divided by its density. The critics' loss alone trains the encoder, as in DrQ. Sources: Kumar
    et al. 2020; Haarnoja et al. 2018.
    """
    cql_weight, samples = 5.0, 10                                    # the first as in the paper

    def __init__(self, cfg, action_size, terminates, device, compiled=False):
        super().__init__(cfg, device)
        self.encoder = moto.Encoder(cfg)
        self.actor = moto.GaussianActor(cfg, action_size)
        self.ema_policy = moto.Policy(cfg, self.encoder, self.actor)
        self.critic = moto.Critic(cfg, action_size)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_tau = nn.ParameterList([nn.Parameter(torch.tensor(math.log(0.1)))])
        self.prepare(encoder=cfg.actor_lr, actor=cfg.actor_lr, critic=cfg.critic_lr,
                     log_tau=cfg.actor_lr)

    def losses(self, feat, batch):
        """feat (B, T', E) of the stacked images, batch of (B, T', ...) -> loss, metrics."""
        cfg, a, valid, unit = self.cfg, batch["a"][:, 1:], batch["valid"], self.critic.unit
        feat_sg, (log_tau,) = feat.detach(), self.log_tau
        policy = self.actor(feat_sg)
        policy_action, logp = policy.rsample(torch.randn_like(policy.mean))  # (B, T', A), (B, T')
        V = (self.target(feat_sg, policy_action).min(0).values - log_tau.exp() * logp).detach()
        discount = cfg.gamma * (1 - batch["is_terminal"][:, 1:])
        y = moto.critic_target(batch["r"][:, 1:], discount, V[:, 1:])
        q = self.critic(feat[:, :-1], a)
        critic, gap = moto.critic_loss(q, y, valid, unit), q.new_zeros(())
        if self.cql_weight:
            gap = sum(moto.weighted_mean(others - data, valid)                # in `critic`'s unit
                      for others, data in zip(self.integral(feat, policy), q)) / unit ** 2
        with frozen(self.critic):
            q_policy = self.critic(feat_sg, policy_action).min(0).values
        actor = (log_tau.exp().detach() * logp - q_policy).mean() / unit
        balance = -log_tau * (logp.detach() - a.shape[-1]).mean()
        nll = moto.behaviour_loss(self.actor, feat_sg, batch["a"], valid)
        return critic + self.cql_weight * gap + actor + balance, {
            "actor/behaviour_nll": nll, "critic/real": critic, "critic/gap": gap * unit ** 2,
            "actor/value": q_policy.mean() / unit, "actor/entropy": -logp.mean(),
            "actor/tau": log_tau.exp()}

    def integral(self, feat, policy):
        """ln of the integral of exp Q(s, a) over a in [-1, 1]^A, for each critic: (2, B, T'-1)."""
        B, T, A = policy.mean.shape
        with torch.no_grad():
            noise = torch.randn(self.samples, B, T, A, device=feat.device)
            policy_action, logp = policy.rsample(noise)
            uniform = torch.rand_like(policy_action) * 2 - 1
        actions = torch.cat([uniform[:, :, :-1], policy_action[:, :, :-1], policy_action[:, :, 1:]])
        log_density = torch.cat([torch.full_like(logp[:, :, :-1], -A * math.log(2)),
                                 logp[:, :, :-1], logp[:, :, 1:]])             # (3 n, B, T'-1)
        q = self.critic(feat[:, :-1].expand(len(actions), -1, -1, -1), actions)
        return (q - log_density).logsumexp(1) - math.log(len(actions))


class SAC(CQL):
    """Soft actor-critic, Haarnoja et al. 2018: CQL without its conservative term."""
    cql_weight = 0.0


# Outside of `if __name__ ...`, because the processes that play episodes import this file, too.
for name, learner in {"iql": IQL, "cql": CQL, "sac": SAC}.items():
    moto.AGENTS[name] = learner
    moto.VARIANTS[name] = {}                                         # changes no number of Config

if __name__ == "__main__":
    sys.exit(moto.main())
