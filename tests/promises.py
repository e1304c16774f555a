"""What every engine promises about a gradient's way into the weights, written once for all engines.

promise_ranks.py runs these on real ranks: `Trainer` is how a script trains with one engine. Each
promise is a function of a function that makes trainers; trainers are used one after the other.
promises_of_layers.py has those of layers without a gradient.
"""

import contextlib
import os

import torch

import gcompress
from gcompress import Policy

LONG = os.environ.get("GCOMPRESS_LONG") == "1"
PROMISES = {}
_trained = {}
LEARNING_RATE = 0.5


def promise(*engines):
    """Register a promise, of these engines only if any are named."""

    def register(function):
        PROMISES[function.__name__] = (function, engines)
        return function

    return register


class Trainer:
    """A model of one rank, its optimizer and its exchange; a context.

    Args:
        model: a module.
        compression: what `gcompress.as_policy` takes.
        make_optimizer: function of parameters.
        options: of the engine, such as scaler=.
    """

    engine = None  # its name
    local_size = 1  # how many ranks encode their mean together
    remembers = True  # whether the exchange can tell what is remembered
    random = True  # whether a tensor has the same seeds in every trainer

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def call(self, x):
        """The model's output, through whatever module has the engine's hooks."""
        return self.model(x)

    def loss(self, x):
        return self.call(x).square().mean()

    def gather(self, tensor):
        """A tensor of each rank."""

    def mean(self, tensor):
        return sum(self.gather(tensor)) / self.size

    def same(self, tensor):
        """Whether all ranks have the same bits."""
        return all(torch.equal(other, tensor) for other in self.gather(tensor.detach()))

    def synchronize(self):
        """Have the means in all gradients."""

    def step(self, scaler=None):
        """Step after `synchronize`, through the scaler if there is one."""
        scaler.step(self.optimizer) if scaler else self.optimizer.step()

    def state_of_all(self):
        """One state for all ranks."""
        state = self.exchange.full_state_dict()
        assert all(self.same(vector) for vector in state["sums"].values())
        return state

    def residuals_of_servers(self, name, numel):
        """What this rank knows of the servers' residuals of a parameter."""
        return torch.zeros(numel)

    def memory(self):
        """{name: tensor} of all that this rank, and its servers, remember."""
        state = self.exchange.state_dict() if self.remembers else {}
        found = {}
        for kind in ("feedback", "owner_feedback", "memories", "servers"):
            collect(kind, state.get(kind, {}), found)
        return found


def collect(name, value, found):
    """Put copies of the tensors of nested dicts into `found`, by path."""
    if isinstance(value, dict):
        for key, each in value.items():
            collect(f"{name}/{key}", each, found)
    elif isinstance(value, torch.Tensor):
        found[name] = value.clone()


def make_model(width=300):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(40, width), torch.nn.Tanh(), torch.nn.Linear(width, 50), torch.nn.Linear(50, 30)]
    return torch.nn.Sequential(*layers)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


def batch(step, rank):
    return torch.randn(8, 40, generator=torch.Generator().manual_seed(1000 * step + rank))


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def policies(trainer_class, turn=0):
    """Every exchange and every kind of memory that the engine has; by nodes every other one from `turn` on."""
    found = [Policy("topk:sparsity=0.9"), Policy("quantize:bits=3"), Policy("topk:sparsity=0.9", feedback_decay=0.7)]
    if trainer_class.engine != "byteps":
        found += [Policy("quantize:bits=3", error_feedback="ef21"), Policy("quantize:bits=3", residual="int8")]
    if trainer_class.engine in ("horovod", "ddp"):
        found += [
            Policy("topk:sparsity=0.9", exchange="twophase"),
            Policy("lowrank:rank=2", exchange="summed"),
            Policy("randomk:sparsity=0.75", exchange="summed", error_feedback=True),
            Policy("threshold:threshold=0.002"),
            Policy("quantize:bits=3", exchange="turns"),
            Policy("lowrank:rank=2", exchange="summed", error_feedback="ef21"),
            Policy("lowrank:rank=2", exchange="summed", residual="bf16"),
            Policy("topk:sparsity=0.95", momentum=0.9, exchange="twophase", residual="int8"),
            Policy("topk:sparsity=0.95", momentum=0.9, clip=0.02, warmup_steps=4, exchange="twophase"),
        ]
    if trainer_class.engine == "byteps":  # through its Python interface
        found += [Policy("randomk:sparsity=0.75", exchange="summed", error_feedback=True)]
    if trainer_class.engine == "mpi":
        found += [Policy("topk:sparsity=0.95", momentum=0.9, clip=0.02)]
        found += [Policy("topk:sparsity=0.95", momentum=0.9, residual="bf16")]
    if trainer_class.random:
        found += [Policy("quantize:bits=2,rounding=stochastic", exchange=found[-1].exchange, error_feedback=True)]
    return found if trainer_class.local_size == 1 or LONG else found[turn::2]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(trainer, steps=6, between=lambda trainer, step: None):
    """Plain training; `between` is called before each step's own work."""
    for step in range(steps):
        between(trainer, step)
        trainer.optimizer.zero_grad()
        trainer.loss(batch(step, trainer.rank)).backward()
        trainer.synchronize()
        trainer.step()
    return weights(trainer), trainer.memory()


def trained(new, policy):
    """What plain training ends with, which several promises compare with: done once for each policy."""
    key = new, str(policy)
    if key not in _trained:
        with new(make_model(), policy) as trainer:
            _trained[key] = train(trainer)
    return _trained[key]


def train_scaled(trainer, scaler, overflows=(1, 2, 4), steps=6):
    """The usual loop of mixed precision, with overflows on another rank each time; a skipped batch is repeated."""
    for step in range(steps):
        for attempt in range(1 + (step in overflows)):
            trainer.optimizer.zero_grad()
            before = trainer.memory()
            poisoned = step in overflows and attempt == 0
            with contextlib.ExitStack() as stack:
                if poisoned and trainer.rank == step % trainer.size:
                    # One tensor of one rank; all others are finite.
                    parameter = list(trainer.model.parameters())[2 * (step % 2)]
                    stack.callback(parameter.register_hook(lambda gradient: gradient * float("inf")).remove)
                scaler.scale(trainer.loss(batch(step, trainer.rank))).backward()
            trainer.synchronize()
            scaler.unscale_(trainer.optimizer)
            trainer.step(scaler)
            scaler.update()
            if trainer.remembers:
                assert equal(before, trainer.memory()) == poisoned, (step, attempt, "memory")
    return weights(trainer), trainer.memory()


@promise()
def a_loss_scaler_changes_no_bit(new):
    """Whatever overflows, backs off and grows again: weights and memory are those of training without it."""
    for number, policy in enumerate(policies(new.trainer)):
        expected, memory = trained(new, policy)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=2)
        # Found by itself, given, or known as a number.
        given = (None, scaler, scaler.get_scale)[number % 3]
        with new(make_model(), policy, scaler=given) as trainer:
            got, remembered = train_scaled(trainer, scaler)
        assert equal(got, expected), policy
        assert equal(remembered, memory), policy
        assert scaler.get_scale() != 2.0**9


@promise()
def a_step_thrown_away_leaves_no_trace(new):
    """Gradients that are computed, exchanged and zeroed: what follows is as if they had never been."""
    for policy in policies(new.trainer, turn=1):
        expected, memory = trained(new, policy)

        def thrown_away(trainer, step):
            for extra in range(step % 3):
                trainer.model.zero_grad(set_to_none=step % 2 == 0)
                trainer.loss(batch(100 + 10 * step + extra, trainer.rank)).backward()
                trainer.synchronize()

        with new(make_model(), policy) as trainer:
            got, remembered = train(trainer, between=thrown_away)
        assert equal(got, expected), policy
        assert equal(remembered, memory), policy


@promise("horovod", "ddp", "mpi")
def what_is_added_to_a_result_is_not_sent_twice(new):
    """Two batches exchanged without a zero_grad between: both arrive once, now or later."""
    for exchange in ("allgather", "twophase"):
        with new(make_model(), Policy("topk:sparsity=0.9", exchange=exchange)) as trainer:
            alone = make_model()
            trainer.optimizer.zero_grad()
            for number in range(2):
                alone(batch(number, trainer.rank)).square().mean().backward()
                trainer.loss(batch(number, trainer.rank)).backward()
                trainer.synchronize()
            before = weights(trainer)
            trainer.step()
            assert_nothing_is_lost(trainer, before, {name: p.grad for name, p in alone.named_parameters()})


def residuals_of_the_mean(trainer):
    """{name: residuals of all ranks, owners and servers, as a part of the mean}, of compressed parameters."""
    memory, residuals = trainer.memory(), {}
    for name, p in trainer.model.named_parameters():
        found = torch.zeros(p.numel())
        for key, value in memory.items():
            if key in (f"feedback/{name}", f"feedback/{name}/0", f"feedback/residual/{name}"):
                found += value
        residuals[name] = trainer.mean(found)
        pieces = torch.zeros(p.numel())
        for key, value in memory.items():
            if key.startswith(f"owner_feedback/{name}["):
                start, stop = map(int, key.rpartition("[")[2][:-1].split(":"))
                pieces[start:stop] = value
        residuals[name] += trainer.mean(pieces) * trainer.size
        residuals[name] += trainer.mean(trainer.residuals_of_servers(name, p.numel())) * trainer.size
    return residuals


def assert_nothing_is_lost(trainer, before, given):
    """What `sgd` applied and the residuals must be the mean of {name: what each rank gave}; returns the residuals."""
    residuals = residuals_of_the_mean(trainer)
    for name, p in trainer.model.named_parameters():
        applied = (before[name] - p.detach()).view(-1) / LEARNING_RATE
        torch.testing.assert_close(applied + residuals[name], trainer.mean(given[name]).view(-1), atol=1e-5, rtol=1e-4)
    return residuals


class Product(torch.nn.Module):
    """Its parameter's gradient is its input."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.float16))

    def forward(self, x):
        return self.w * x


@promise("horovod", "ddp", "mpi")
def float16_gradients_stay_finite_and_arrive(new):
    """The mean of large float16 gradients, coded coarsely, would lie beyond float16."""
    for spec in ("mxfp4", "eden:bits=4", "natural"):
        holder = Product()
        policy = Policy(spec, error_feedback=True)
        with new(holder, policy, lambda parameters: torch.optim.SGD(parameters, lr=1e-3)) as trainer:
            arrived = torch.zeros(64, 64)
            for step in range(4):
                trainer.optimizer.zero_grad()
                trainer.call(torch.full((64, 64), 60000.0 if step == 0 else 1.0, dtype=torch.float16)).sum().backward()
                trainer.synchronize()
                assert bool(holder.w.grad.isfinite().all()), spec
                arrived += holder.w.grad
                trainer.step()
            residuals = residuals_of_the_mean(trainer)["w"]
            total = arrived.view(-1) + residuals
            assert ((total - 60003).abs() < 60003 * 0.01).all(), (spec, total.min(), total.max())


@promise("byteps")
def a_layer_unfrozen_later_is_refused(new):
    """BytePS exchanges what was trained when its optimizer was made: workers would drift apart."""
    model = make_model()
    model[0].requires_grad_(False)
    with new(model, Policy("topk:sparsity=0.9")) as trainer:
        train(trainer, steps=2)
        model[0].requires_grad_(True)
        with refused(gcompress.ConfigError, "would not exchange it"):
            train(trainer, steps=1)


@promise("horovod", "ddp", "mpi")
def a_state_that_is_not_this_ranks_is_refused(new):
    policy = Policy("topk:sparsity=0.9", exchange="twophase")
    with new(make_model(), policy) as trainer:
        train(trainer, steps=3)
        state, exchange = trainer.exchange.state_dict(), trainer.exchange
        before = trainer.memory()
        wrong = {
            "another rank's": {**state, "rank": (trainer.rank + 1) % trainer.size},
            "another size's": {**state, "world_size": trainer.size + 2},
            "not finite": {**state, "feedback": {n: t * float("nan") for n, t in state["feedback"].items()}},
            "another model's": {**state, "feedback": {f"x{n}": t for n, t in state["feedback"].items()}},
            "of other sizes": {**state, "feedback": {n: t[:-1] for n, t in state["feedback"].items()}},
            "incomplete": {key: value for key, value in state.items() if key != "steps"},
            "of no report": {**state, "report": None},
            "of no steps": {**state, "steps": "x"},
            "of fewer than no steps": {**state, "steps": -1},
            "no state": 7,
        }
        if trainer.engine == "mpi":
            wrong["of no servers"] = {**state, "servers": None}
            wrong["of other servers"] = {**state, "servers": {0: torch.zeros(7, dtype=torch.uint8)}}
        else:
            wrong["of no shapes"] = {**state, "shapes": 7}
            wrong["of foreign memories"] = {**state, "memories": {"x": {"basis": torch.zeros(3)}}}
            wrong["of no memories"] = {**state, "memories": {"0.weight": {"basis": "hello"}}}
            merged = {
                "sums": {},
                **{key: state[key] for key in gcompress.exchange.saved_state.MERGED_KEYS if key != "sums"},
            }
            wrong["of no ranks"] = {**merged, "world_size": 0}
        for what, each in wrong.items():
            with refused(gcompress.ConfigError, "", what):
                exchange.load_state_dict(each)
            assert equal(before, trainer.memory()), what
        exchange.load_state_dict(state)
        assert equal(before, trainer.memory())


@promise("horovod", "ddp", "mpi")
def the_state_of_all_ranks_is_one_that_any_rank_may_load(new):
    policy = Policy("topk:sparsity=0.9", exchange="twophase")
    with new(make_model(), policy) as trainer:
        train(trainer, steps=3)
        residuals = residuals_of_the_mean(trainer)
        trainer.exchange.load_state_dict(trainer.state_of_all())
        after = residuals_of_the_mean(trainer)
        for name, value in residuals.items():
            torch.testing.assert_close(after[name], value, atol=1e-6, rtol=1e-5)


@promise("horovod", "mpi", "byteps")
def a_scaler_without_synchronize_is_refused(new):
    """Means in units of the scaled loss would land on gradients that the scaler has unscaled."""
    with new(make_model(), Policy("topk:sparsity=0.9")) as trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
        scaler.scale(trainer.loss(batch(0, trainer.rank))).backward()
        with refused(gcompress.ConfigError, "synchronize"):
            scaler.step(trainer.optimizer)
        trainer.synchronize()


@promise("ddp")
def a_gradient_for_another_models_sake_does_not_come_back(new):
    """A generator's pass through a discriminator, whose gradients are zeroed before its own step."""

    def make_trainers():
        # All are compressed: the order in which Gloo adds three floats depends on their place in a bucket.
        return new(make_model(), Policy("topk:sparsity=0.99", min_numel=0))

    with make_trainers() as trainer:
        expected, _ = train(trainer)
    with make_trainers() as trainer:
        source = torch.nn.Linear(40, 40)

        def generate(trainer, step):
            trainer.loss(source(batch(50 + step, trainer.rank))).backward()

        got, _ = train(trainer, between=generate)
    assert equal(got, expected)


@promise("ddp")
def updates_without_a_torch_optimizer(new):
    """Weights that change in place count as applied; others are said to be."""
    policy = Policy("topk:sparsity=0.9", exchange="twophase")
    with new(make_model(), policy) as trainer:
        expected, memory = train(trainer)
    for told in (False, True):
        with new(make_model(), policy) as trainer:
            for step in range(6):
                trainer.model.zero_grad()
                trainer.loss(batch(step, trainer.rank)).backward()
                for p in trainer.model.parameters():
                    if told:
                        p.data -= 0.5 * p.grad
                    else:
                        with torch.no_grad():
                            p -= 0.5 * p.grad
                if told:
                    trainer.exchange.applied()
            trainer.exchange.applied()
            assert equal(weights(trainer), expected) and equal(trainer.memory(), memory), told


@promise("ddp")
def fused_optimizers_that_skip_inside(new):
    def fused(parameters):
        return torch.optim.SGD(parameters, lr=0.5, fused=True)

    policy = Policy("topk:sparsity=0.9")
    with new(make_model(), policy, fused) as trainer:
        expected, memory = train(trainer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=2)
    with new(make_model(), policy, fused) as trainer:
        got, remembered = train_scaled(trainer, scaler)
    assert equal(got, expected) and equal(remembered, memory)


@promise("mpi")
def a_batch_skipped_before_its_means_are_there(new):
    """`if loss is bad: zero_grad(); continue` after the backward pass, on all workers."""
    policy = Policy("topk:sparsity=0.9")
    with new(make_model(), policy) as trainer:
        expected, memory = train(trainer)

    def skipped(trainer, step):
        if step % 2:
            trainer.optimizer.zero_grad()
            trainer.loss(batch(200 + step, trainer.rank)).backward()

    with new(make_model(), policy) as trainer:
        got, remembered = train(trainer, between=skipped)
    assert equal(got, expected) and equal(remembered, memory)


@promise("mpi")
def an_accumulation_that_is_interrupted_begins_again(new):
    policy = Policy("topk:sparsity=0.9")

    def accumulate(trainer, interrupted):
        for step in range(4):
            if interrupted:
                trainer.optimizer.zero_grad()
                trainer.loss(batch(300 + step, trainer.rank)).backward()
            trainer.optimizer.zero_grad()
            for part in range(2):
                trainer.loss(batch(10 * step + part, trainer.rank)).backward()
            trainer.synchronize()
            trainer.step()
        return weights(trainer), trainer.memory()

    found = []
    for interrupted in (False, True):
        with new(make_model(), policy, backward_passes_per_step=2) as trainer:
            found.append(accumulate(trainer, interrupted))
    assert all(equal(*pair) for pair in zip(*found, strict=True))


@contextlib.contextmanager
def refused(kind, text, what=""):
    """The body must raise such an error with such a text; gives a list that the error is then in."""
    caught = []
    try:
        yield caught
    except kind as error:
        assert text in str(error), f"{text!r} is not in {error}"
        caught.append(error)
    else:
        raise AssertionError(f"{what}: expected {kind.__name__}")
