"""Graphs of skipped steps: every state, who may use one when, and when one must not be used."""

from __future__ import annotations

import gc
import inspect
import threading
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lesa.engine.graphs.capture import CudaRecorder, Recording
from lesa.engine.graphs.refusal import refusal
from lesa.engine.graphs.step_graphs import GraphKey, State, StepGraphs
from lesa.engine.graphs.weights_state import signature
from lesa.hooks.class_swap import FeatureHook, Signals

CPU = torch.device("cpu")
B, L, C, OUT, K, STEPS = 1, 5, 8, 3, 3, 6
KEY = GraphKey((B, L, C), torch.float32, CPU, "cond", K, STEPS)


class Tape(TorchDispatchMode):
    """Like a graph it keeps operations with the addresses and numbers that they were run with."""

    def __init__(self):
        super().__init__()
        self.calls, self.released = [], False

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # torch would import all of dynamo for it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append(tree_map(_alias, (func, args, kwargs or {}, result)))
        return result

    def replay(self):
        assert not self.released
        self.output.fill_(torch.nan)  # so that a replay that does nothing is seen
        for func, args, kwargs, result in self.calls:
            found = tree_leaves(func(*args, **kwargs))
            for kept, now in zip(tree_leaves(result), found, strict=True):
                kept.copy_(now)

    def reset(self):
        self.released = True


def _alias(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


class FakeRecorder:
    """Records on the CPU, counts, and fails on request."""

    def __init__(self):
        self.warm_ups, self.attempts, self.tapes = 0, 0, []
        self.reason, self.error, self.queue = None, None, 1

    def refusal(self, device):
        return self.reason

    def stream(self, device):
        return self.queue

    def warm_up(self, body, device):
        self.warm_ups += 1
        return body()

    def capture(self, body, device):
        self.attempts += 1
        if self.error is not None:
            raise self.error
        tape = Tape()
        with torch.inference_mode(False), tape:  # the results are to be overwritten in any mode
            output = tape.output = body()
        self.tapes.append(tape)
        return Recording(tape, output)

    def release(self, handle):
        handle.reset()


class Static:
    """What a skipped step reads and writes, filled with one generation's own numbers."""

    def __init__(self, device=CPU):
        self.ring = torch.zeros(K, B, L, C, device=device)
        self.slots = torch.zeros(K, dtype=torch.int32, device=device)
        self.table = torch.zeros(STEPS, K, device=device)
        self.scale = torch.zeros(STEPS, B, C, device=device)
        self.shift = torch.zeros(STEPS, B, C, device=device)
        self.step = torch.zeros(1, dtype=torch.int32, device=device)

    def fill(self, seed):
        draw = torch.Generator().manual_seed(seed)
        for static in (self.ring, self.table, self.scale, self.shift):
            static.copy_(torch.randn(static.shape, generator=draw))

    def go_to(self, step):
        """What changes between two skipped steps: the number, the slots, one slot's content."""
        self.step.fill_(step)
        self.slots.copy_(torch.arange(K, dtype=torch.int32).roll(step))
        self.ring[step % K].mul_(1.1)


def make_body(projection):
    def make(static):
        dtype = projection.weight.dtype

        def body():
            kept = static.ring.index_select(0, static.slots)
            weights = static.table.index_select(0, static.step).view(K, 1, 1, 1)
            scale, shift = (rows.index_select(0, static.step)[0, :, None] for rows in rows_of())
            normed = layer_norm((weights * kept).sum(0), (C,)) * (1 + scale) + shift
            return projection(normed.to(dtype)).float()

        def rows_of():
            return static.scale, static.shift

        return body

    return make


def expected(static, projection):
    """The same in plain eager operations, without slots or rows on the device."""
    s = int(static.step)
    kept = torch.stack([static.ring[slot] for slot in static.slots.tolist()])
    mixed = (static.table[s].view(K, 1, 1, 1) * kept).sum(0)
    normed = layer_norm(mixed, (C,)) * (1 + static.scale[s][:, None]) + static.shift[s][:, None]
    return projection(normed.to(projection.weight.dtype)).float()


class Lora(nn.Module):
    """Attributes as PEFT's layers have them."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(C, 2, bias=False), nn.Linear(2, OUT, bias=False)
        self.scaling, self.merged_adapters = {"a": 0.5}, []
        self._active_adapter, self._disable_adapters = ["a"], False

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        result = self.base_layer(x)
        if self._disable_adapters or self.merged_adapters or not self._active_adapter:
            return result
        return result + self.up(self.down(x)) * self.scaling["a"]

    def merge(self):
        delta = self.scaling["a"] * self.up.weight @ self.down.weight
        self.base_layer.weight.data += delta  # as PEFT does: no version counts it
        self.merged_adapters.append("a")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def recorder():
    return FakeRecorder()


@pytest.fixture
def graphs(recorder):
    return StepGraphs(recorder=recorder)


@pytest.fixture
def projection():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(C, OUT)).eval()[0]


def lend(graphs, projection, key=KEY, **options):
    lease = graphs.acquire(key, [projection], Static, make_body(projection), **options)
    lease.buffers.fill(1)
    return lease


def run(lease, projection, steps=range(STEPS)):
    """Runs steps and compares each with the eager one; the states after each."""
    states = []
    for step in steps:
        lease.buffers.go_to(step)
        assert torch.equal(lease.run(), expected(lease.buffers, projection))
        states.append(lease.state)
    return states


def test_absent_warm_captured(graphs, recorder, projection):
    lease = lend(graphs, projection)
    assert lease.state is State.ABSENT
    states = run(lease, projection)
    assert states == [State.WARM] + [State.CAPTURED] * (STEPS - 1)
    assert (recorder.warm_ups, recorder.attempts, lease.reason) == (1, 1, None)
    assert graphs.counts == {"captured": 1}


def test_a_later_generation_captures_at_once(graphs, recorder, projection):
    first = lend(graphs, projection)
    run(first, projection)
    first.release()
    second = lend(graphs, projection)
    second.buffers.fill(2)
    assert set(run(second, projection)) == {State.CAPTURED}
    assert (recorder.warm_ups, recorder.attempts) == (1, 2)
    assert [tape.released for tape in recorder.tapes] == [True, False]
    assert graphs.counts == {"captured": 2}


def test_the_output_is_a_clone(graphs, projection):
    lease = lend(graphs, projection)
    outputs = []
    for step in range(4):
        lease.buffers.go_to(step)
        outputs.append((lease.run(), expected(lease.buffers, projection)))
    assert all(torch.equal(found, wanted) for found, wanted in outputs)
    outputs[-1][0].zero_()
    assert torch.equal(lease.run(), outputs[-1][1])


@pytest.mark.parametrize(
    "field, value",
    [
        ("shape", (2, L, C)),
        ("dtype", torch.bfloat16),
        ("device", torch.device("cpu", 1)),
        ("branch", "uncond"),
        ("history", 2),
        ("num_steps", 7),
        ("variant", ("bias",)),
    ],
)
def test_a_key_of_one_other_field_is_warmed_up_anew(graphs, projection, field, value):
    run(lend(graphs, projection), projection, range(2))
    weights = signature([projection])
    assert graphs.known(KEY, weights) == (State.WARM, None)
    assert graphs.known(KEY._replace(**{field: value}), weights) == (State.ABSENT, None)


def write_in_place(linear):
    linear.weight.add_(1)


def replace_data(linear):
    linear.weight.data = linear.weight.data + 1


def replace_parameter(linear):
    linear.bias = nn.Parameter(linear.bias + 1)


def remove_parameter(linear):
    linear.bias = None


def cast(linear):
    linear.to(torch.float64)


def restride(linear):
    # the same memory, read as another matrix
    linear.weight.data = linear.weight.data.as_strided((OUT, C), (1, OUT))


CHANGES = [write_in_place, replace_data, replace_parameter, remove_parameter, cast, restride]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_drop_the_graph(graphs, recorder, projection, change):
    lease = lend(graphs, projection)
    run(lease, projection)
    before = lease.run()
    change(projection)
    assert not torch.equal(expected(lease.buffers, projection), before)
    assert run(lease, projection, range(3)) == [State.WARM, State.CAPTURED, State.CAPTURED]
    assert [tape.released for tape in recorder.tapes] == [True, False]
    assert graphs.counts == {"captured": 2, "invalidated": 1}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_between_generations(graphs, recorder, projection, change):
    lease = lend(graphs, projection)
    run(lease, projection)
    lease.release()
    change(projection)
    assert run(lend(graphs, projection), projection, range(2)) == [State.WARM, State.CAPTURED]
    assert recorder.warm_ups == 2 and graphs.counts == {"captured": 2}


def rescale(lora):
    lora.scaling["a"] = 2.0


def deactivate(lora):
    lora._active_adapter = []


def disable(lora):
    lora._disable_adapters = True


def swap_adapter(lora):
    lora.down = nn.Linear(C, 2, bias=False)


def half_fuse(lora):
    lora.base_layer.weight.add_(0.1)
    raise RuntimeError("out of memory")


def half_load(lora):
    lora.up.weight.data = lora.up.weight.data * 3
    raise KeyError("down")


def half_cast(lora):
    lora.base_layer.weight.data = lora.base_layer.weight.data.clone()
    raise ValueError("no such dtype")


@pytest.mark.parametrize(
    "change",
    [rescale, deactivate, disable, swap_adapter, Lora.merge, half_fuse, half_load, half_cast],
)
def test_a_changed_adapter_drops_the_graph(graphs, projection, change):
    lora = Lora(projection).eval()
    lease = lend(graphs, lora)
    run(lease, lora)
    half = change.__name__.startswith("half")
    with pytest.raises((RuntimeError, KeyError, ValueError)) if half else nullcontext():
        change(lora)
    assert run(lease, lora, range(3)) == [State.WARM, State.CAPTURED, State.CAPTURED]
    assert graphs.counts == {"captured": 2, "invalidated": 1}


def test_a_swapped_module_drops_the_graph(graphs, projection):
    model = nn.Module()
    model.proj_out = projection
    tail = SimpleNamespace(weight=projection.weight)

    def forward(x):
        return model.proj_out(x)

    def make(static):
        forward.weight = tail.weight
        return make_body(forward)(static)

    lease = graphs.acquire(KEY, [model], Static, make)
    lease.buffers.fill(1)
    forward.weight = tail.weight
    run(lease, forward)
    model.proj_out = Lora(projection)  # base layer and its weight stay the same objects
    assert run(lease, forward, range(3)) == [State.WARM, State.CAPTURED, State.CAPTURED]
    assert graphs.counts["invalidated"] == 1


def test_a_cast_that_fails_half_way_is_never_replayed(graphs, recorder, projection):
    lease = lend(graphs, projection)
    run(lease, projection)
    weights = iter([torch.float64])
    with pytest.raises(StopIteration):
        projection._apply(lambda tensor: tensor.to(next(weights)))
    dtypes = {projection.weight.dtype, projection.bias.dtype}
    assert dtypes == {torch.float64, torch.float32}
    for _ in range(2):  # nor at the second try
        with pytest.raises(RuntimeError, match="dtype"):
            lease.run()
    assert recorder.tapes[0].released
    projection.to(torch.float64)
    assert run(lease, projection)[-1] is State.CAPTURED


def test_peft_layers(graphs, projection):
    lora = pytest.importorskip("peft.tuners.lora")
    config = pytest.importorskip("peft").LoraConfig(r=2, init_lora_weights=False)
    layer = lora.Linear(projection, "a", config=config, r=2, lora_alpha=4).eval()
    known = signature([layer])
    changes = [
        lambda: layer.set_scale("a", 0.3),
        lambda: layer.merge(),
        lambda: layer.unmerge(),
        lambda: layer.enable_adapters(False),
        lambda: layer.lora_A["a"].weight.mul_(2),
    ]
    for change in changes:
        assert signature([layer]) == known
        change()
        assert signature([layer]) != known
        known = signature([layer])


def test_the_signature_tells_types_of_the_same_memory_apart():
    layer = nn.Linear(C, OUT, dtype=torch.bfloat16)
    known = signature([layer])
    layer.weight.data = layer.weight.data.view(torch.float16)
    assert signature([layer]) != known


def test_the_signature_looks_into_shells():
    class Shell(torch.Tensor):
        def __tensor_flatten__(self):
            return ["inner"], None

    layer = nn.Module()
    shell = torch.zeros(2).as_subclass(Shell)
    shell.inner = torch.zeros(2)
    layer.register_buffer("packed", shell)
    known = signature([layer])
    assert signature([layer]) == known
    shell.inner.add_(1)
    assert signature([layer]) != known


def test_the_signature_of_inference_tensors(graphs):
    with torch.inference_mode():
        projection = nn.Linear(C, OUT)
        lease = lend(graphs, projection)
        run(lease, projection)
        projection.weight.data = projection.weight.data + 1
        run(lease, projection)
    assert graphs.counts["invalidated"] == 1


def test_buffers_serve_in_and_out_of_inference_mode(graphs, projection):
    with torch.inference_mode():
        lease = lend(graphs, projection)
        run(lease, projection)
        lease.release()
    assert set(run(lend(graphs, projection), projection)) == {State.CAPTURED}


def test_a_failed_capture_is_remembered(graphs, recorder, projection):
    recorder.error = RuntimeError("operation not permitted\nCompile with ...")
    lease = lend(graphs, projection)
    assert run(lease, projection)[1:] == [State.REFUSED] * (STEPS - 1)
    assert lease.reason == "capture failed: RuntimeError: operation not permitted"
    lease.release()
    recorder.error = None
    again = lend(graphs, projection)
    assert set(run(again, projection)) == {State.REFUSED} and again.reason
    assert recorder.attempts == 1 and graphs.counts == {"failed": 1}
    write_in_place(projection)  # another body: another try
    assert run(again, projection)[-1] is State.CAPTURED and again.reason is None
    other = lend(graphs, projection, KEY._replace(branch="uncond"))
    assert run(other, projection)[-1] is State.CAPTURED


def test_an_interrupted_capture_leaves_nothing(graphs, recorder, projection):
    recorder.error = KeyboardInterrupt()
    lease = lend(graphs, projection)
    run(lease, projection, [0])
    with pytest.raises(KeyboardInterrupt):
        lease.run()
    recorder.error = None
    assert set(run(lease, projection, range(2))) == {State.CAPTURED}


def test_a_body_that_raised_is_made_anew(graphs, projection):
    lease = lend(graphs, projection)
    run(lease, projection)
    weight = projection.weight
    projection.weight = nn.Parameter(torch.zeros(OUT, C + 1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        lease.run()
    projection.weight = weight
    assert run(lease, projection)[-1] is State.CAPTURED


def test_what_is_known_of_keys_has_a_limit(graphs, recorder, projection, monkeypatch):
    monkeypatch.setattr("lesa.engine.graphs.step_graphs._MAX_KNOWN", 2)
    for branch in "abca":
        run(lend(graphs, projection, KEY._replace(branch=branch)), projection, range(2))
    assert len(graphs._known) <= 2 and recorder.warm_ups == 4


def test_the_end_of_a_lease_frees_its_buffers_and_its_graph(graphs, recorder, projection):
    leases = [lend(graphs, projection, KEY._replace(branch=name)) for name in "abc"]
    for lease in leases:
        run(lease, projection)
    buffers = [weakref.ref(lease.buffers) for lease in leases]
    gc.disable()
    try:
        leases[0].release()
        del leases[1], lease
        assert [tape.released for tape in recorder.tapes] == [True, True, False]
        assert [held() is None for held in buffers] == [True, True, False]
    finally:
        gc.enable()
    assert set(run(leases[1], projection)) == {State.CAPTURED}


def test_nothing_is_kept_alive(projection):
    graphs = StepGraphs(recorder=FakeRecorder())
    lease = lend(graphs, projection)
    run(lease, projection)
    buffers = weakref.ref(lease.buffers)
    gc.disable()
    try:
        del lease, graphs
        assert buffers() is None  # without the garbage collector
    finally:
        gc.enable()


def test_two_leases_of_one_key_share_nothing(graphs, projection):
    first, second = lend(graphs, projection), lend(graphs, projection)
    second.buffers.fill(2)
    for step in range(STEPS):
        run(first, projection, [step])
        run(second, projection, [step])
    assert first.state is second.state is State.CAPTURED
    places = [{t.data_ptr() for t in vars(x.buffers).values() if isinstance(t, torch.Tensor)}
              for x in (first, second)]  # fmt: skip
    assert not places[0] & places[1]


def test_threads_do_not_disturb_each_other(recorder, projection):
    graphs = StepGraphs(recorder=recorder)
    start, errors = threading.Barrier(4), []

    @torch.no_grad()
    def generate(seed):
        try:
            for generation in range(3):
                start.wait(timeout=60)
                lease, own = lend(graphs, projection), Static()
                start.wait(timeout=60)  # all four are lent out now
                for mine in (lease.buffers, own):
                    mine.fill(10 * seed + generation)
                for step in range(STEPS):
                    lease.buffers.go_to(step)
                    own.go_to(step)
                    assert torch.equal(lease.run(), expected(own, projection))
                start.wait(timeout=60)
                lease.release()
        except BaseException as error:
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=generate, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert graphs.counts == {"captured": 12} and recorder.attempts == 12


def test_a_lease_that_has_ended_does_not_run(graphs, projection):
    lease = lend(graphs, projection)
    lease.release()
    with pytest.raises(AssertionError, match="ended"):
        lease.run()


def test_another_stream_is_warmed_up_anew(graphs, recorder, projection):
    for queue in (1, 2, 1):
        recorder.queue = queue
        run(lend(graphs, projection), projection)
    assert recorder.warm_ups == 2


@pytest.mark.parametrize("value, off", [("1", True), ("yes", True), ("0", False), ("", False)])
def test_the_environment_is_read_at_every_generation(
    graphs, recorder, projection, monkeypatch, value, off
):
    lease = lend(graphs, projection)
    run(lease, projection)
    lease.release()
    monkeypatch.setenv("LESA_DISABLE_GRAPH", value)
    lease = lend(graphs, projection)
    assert lease.reason == ("LESA_DISABLE_GRAPH is set" if off else None)
    replay = recorder.tapes[0].replay
    recorder.tapes[0].replay = lambda: pytest.fail("replayed") if off else replay()
    run(lease, projection)
    lease.release()
    recorder.tapes[0].replay = replay
    monkeypatch.delenv("LESA_DISABLE_GRAPH")
    lease = lend(graphs, projection)
    assert lease.reason is None
    assert set(run(lease, projection)) == {State.CAPTURED}


def test_weights_that_move_during_a_generation_are_refused(graphs, recorder, projection):
    lease = lend(graphs, projection)
    run(lease, projection)
    weight = projection.weight
    projection.weight = nn.Parameter(torch.empty(OUT, C, device="meta"))
    lease.run()
    assert lease.reason == "weights of Linear are on meta, the feature on cpu"
    assert (recorder.attempts, recorder.tapes[0].released, lease.state) == (1, True, State.ABSENT)
    projection.weight = weight
    run(lease, projection)


def hook_sequential(linear):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(linear, AlignDevicesHook())
    add_hook_to_module(linear, AlignDevicesHook("cpu", offload=True), append=True)


def hook_harmless(linear):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(linear, AlignDevicesHook("cpu"))


def hook_model(linear):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(linear, "cpu")


def hook_group(linear):
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(linear, CPU, offload_type="leaf_level")


def hook_casting(linear):
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(linear, torch.float8_e4m3fn, torch.float32, None)


def hook_accelerate_casting(linear):
    from accelerate.hooks import LayerwiseCastingHook, add_hook_to_module

    add_hook_to_module(linear, LayerwiseCastingHook(torch.float16, torch.float32, False))


def hook_forward(linear):
    linear.register_forward_hook(lambda *_: None)


def hook_tap(linear):
    linear.register_forward_pre_hook(FeatureHook(Signals()), with_kwargs=True)


@pytest.mark.parametrize(
    "change, wanted",
    [
        (hook_sequential, "accelerate's AlignDevicesHook is on Linear"),
        (hook_model, "accelerate's CpuOffload is on Linear"),
        (hook_accelerate_casting, "accelerate's LayerwiseCastingHook is on Linear"),
        (hook_group, "diffusers' group_offloading is on Linear"),
        (hook_casting, "diffusers' layerwise_casting is on Linear"),
        (hook_forward, "a forward hook is on Linear"),
        (lambda linear: linear.to("meta"), "weights of Linear are on meta, the feature on cpu"),
        (hook_harmless, None),
        (hook_tap, None),
        (lambda linear: None, None),
    ],
)
def test_what_hangs_on_the_modules_may_refuse(graphs, recorder, projection, change, wanted):
    change(projection)
    assert refusal([nn.Sequential(projection)], CPU, recorder=recorder) == wanted
    whole_model = wanted is not None and "weights" not in wanted and "forward" not in wanted
    alone = refusal([], CPU, recorder=recorder, model=projection)
    assert alone == (wanted if whole_model else None)


def test_weights_elsewhere_are_refused(recorder, projection):
    found = refusal([projection], torch.device("cuda:0"), recorder=recorder)
    assert found == "weights of Linear are on cpu, the feature on cuda:0"


def test_modes_that_are_refused(recorder, projection):
    with torch.enable_grad():
        assert refusal([projection], CPU, recorder=recorder) == "grad is enabled"
    with torch.autocast("cpu", torch.bfloat16):
        assert refusal([projection], CPU, recorder=recorder) == "autocast is on"


def test_a_refused_lease_computes_eagerly(graphs, recorder, projection):
    recorder.reason = "a stream capture is under way"
    lease = lend(graphs, projection)
    assert set(run(lease, projection)) == {State.ABSENT}
    assert lease.reason == recorder.reason
    write_in_place(projection)
    run(lease, projection)
    assert (recorder.warm_ups, recorder.attempts, graphs.counts) == (0, 0, {})


def test_what_cuda_refuses(projection, monkeypatch):
    assert refusal([projection], CPU) == "cpu is not a CUDA device"
    assert CudaRecorder().stream(CPU) == 0
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert refusal([projection], cuda) == "a stream capture is under way"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert CudaRecorder().refusal(cuda) is None


class Stream:
    """A CUDA stream that nobody waits for."""

    def __init__(self, number=None):
        self.cuda_stream = number

    def wait_stream(self, other):
        pass


class RandomState:
    """A generator of the device: a state that a capture marks, and that copies do not share."""

    def __init__(self, state=None):
        self.state = state or {"capturing": False}

    def graphsafe_get_state(self):
        return RandomState(self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state

    def clone_state(self):
        return RandomState(dict(self.state))


class PretendCuda:
    """The few calls of torch.cuda that a capture makes, by their real signatures."""

    def __init__(self, monkeypatch):
        self.current, self.tokens, self.freed, self.recording = 7, 0, [], set()
        self.breaks, self.captures, self.resets = False, [], 0
        self.random = RandomState()
        real = inspect.signature(torch.cuda.CUDAGraph.capture_begin)

        class Graph:
            ended = False

            def capture_begin(graph, *args, **kwargs):
                bound = real.bind(graph, *args, **kwargs).arguments
                graph.pool = bound["pool"]
                del bound["self"]
                self.captures.append({**bound, "stream": self.current})
                self.recording.add(graph.pool)
                graph.random = self.random.state
                graph.random["capturing"] = True

            def capture_end(graph):
                if self.breaks:  # torch leaves the allocator recording, and the mark
                    raise RuntimeError("operation failed due to a previous error during capture")
                self.recording.discard(graph.pool)
                graph.random["capturing"] = False
                graph.ended = True

            def reset(graph):
                graph.ended = False
                self.resets += 1

        @contextmanager
        def stream(which):
            before, self.current = self.current, which
            try:
                yield
            finally:
                self.current = before

        def end(index, token):
            if token not in self.recording:
                raise RuntimeError("not currently recording to mempool_id")
            self.recording.discard(token)

        for name, value in {
            "CUDAGraph": Graph,
            "stream": stream,
            "device": lambda device: nullcontext(),
            "Stream": lambda device: Stream(),
            "current_stream": lambda device: Stream(self.current),
            "graph_pool_handle": self.token,
            "default_generators": (self.random,),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(CudaRecorder, "_streams", {})
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        release = lambda index, token: self.freed.append((index, token))  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)

    def token(self):
        self.tokens += 1
        return 0, self.tokens


CUDA0 = torch.device("cuda:0")


def captured(recorder, body=lambda: None):
    return recorder.capture(body, CUDA0).handle


def test_graphs_of_a_stream_share_a_pool_that_stays(monkeypatch):
    cuda, recorder = PretendCuda(monkeypatch), CudaRecorder()
    first, second = captured(recorder), captured(recorder)
    cuda.current = 8
    other = captured(recorder)
    cuda.current = 7
    assert first.ended and second.ended and other.ended
    assert [bound["pool"] for bound in cuda.captures] == [(0, 1), (0, 1), (0, 2)]
    streams = [bound["stream"] for bound in cuda.captures]
    assert streams[0] is streams[1] is not streams[2]
    assert {bound["capture_error_mode"] for bound in cuda.captures} == {"thread_local"}
    recorder.release(first)
    assert not first.ended and second.ended
    recorder.release(second)
    assert second.ended  # on it hangs the memory, which the next generation's graph takes over
    second = weakref.ref(second)
    third = captured(recorder)
    assert cuda.captures[-1]["pool"] == (0, 1) and third.ended
    assert second() is None


def test_a_warm_up_runs_on_the_stream_of_the_capture(monkeypatch):
    """A stream of its own would keep one more workspace of cuBLAS, for each warm-up."""
    cuda, recorder, streams = PretendCuda(monkeypatch), CudaRecorder(), []
    for _ in range(2):
        recorder.warm_up(lambda: streams.append(cuda.current), CUDA0)
        captured(recorder, lambda: streams.append(cuda.current))
    *side, current, captures = streams[: len(streams) // 2]
    assert len(side) > 1 and set(side) == {captures} and current == 7
    assert set(streams) == {7, captures}


def test_all_recorders_capture_on_one_stream(monkeypatch):
    """Each `lesa.enable` has a recorder; a stream of its own would keep a workspace for each."""
    cuda, states = PretendCuda(monkeypatch), []
    for _ in range(3):
        captured(CudaRecorder(), lambda: states.append(dict(cuda.random.state)))
    assert len({id(bound["stream"]) for bound in cuda.captures}) == 1
    assert states == [{"capturing": False}] * 3  # meanwhile other threads may draw


def test_what_is_released_during_a_capture_is_reset_after_it(monkeypatch):
    """The garbage collector may end a lease inside a capture, or in another thread's."""
    cuda, recorder, other = PretendCuda(monkeypatch), CudaRecorder(), CudaRecorder()
    handles = [captured(recorder), captured(recorder), captured(other), captured(other)]

    def body():
        recorder.release(handles[0])
        other.release(handles[2])
        assert cuda.resets == 0

    captured(recorder, body)
    assert cuda.resets == 2 and [handle.ended for handle in handles] == [False, True, False, True]


@pytest.mark.parametrize("breaks", [False, True])
def test_a_failed_capture_leaves_no_trace_on_the_device(monkeypatch, breaks):
    cuda, recorder = PretendCuda(monkeypatch), CudaRecorder()
    kept = captured(recorder)

    def body():
        cuda.breaks = breaks
        raise ValueError("no kernel")

    with pytest.raises(RuntimeError if breaks else ValueError):
        recorder.capture(body, CUDA0)
    assert cuda.resets == 1 and kept.ended
    assert cuda.current == 7 and not cuda.recording
    assert cuda.random.state == {"capturing": False}  # else no random number can be drawn
    # where torch ended the recording itself, the graph's own reset has released the pool
    assert cuda.freed == ([(0, (0, 1))] if breaks else [])
    cuda.breaks = False
    captured(recorder)
    assert cuda.captures[-1]["pool"] == (0, 2)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu():
    """A projection, a function that lends, and the graphs, all real."""
    device, graphs = torch.device("cuda", torch.cuda.current_device()), StepGraphs()
    projection = nn.Linear(C, OUT, device=device)
    key = KEY._replace(device=device)

    def acquire(make=None):
        make = make or make_body(projection)
        lease = graphs.acquire(key, [projection], lambda: Static(device), make)
        lease.buffers.fill(1)
        return lease

    return projection, acquire, graphs


@needs_gpu
def test_a_replay_on_the_gpu_equals_the_eager_run():
    projection, acquire, graphs = on_gpu()
    lease = acquire()
    eager = make_body(projection)(lease.buffers)
    for step in [*range(STEPS), *range(STEPS)]:
        lease.buffers.go_to(step)
        wanted = eager()
        assert torch.equal(lease.run(), wanted)
        if step == 3:
            projection.weight.mul_(2)
    assert lease.state is State.CAPTURED and lease.reason is None
    assert graphs.counts == {"captured": 3, "invalidated": 2}


@needs_gpu
def test_a_capture_that_breaks_on_the_gpu_harms_nothing():
    projection, acquire, graphs = on_gpu()

    def make(static):
        inner = make_body(projection)(static)

        def body():
            static.ring.sum().item()  # waits for the device: not allowed in a capture
            return inner()

        return body

    lease = acquire(make)
    run(lease, projection)
    assert lease.state is State.REFUSED and lease.reason.startswith("capture failed")
    assert torch.randn(1000, device="cuda").isfinite().all()
    projection.bias.add_(1)
    lease.release()
    again = acquire()
    run(again, projection)
    assert again.state is State.CAPTURED
    assert graphs.counts == {"failed": 1, "captured": 1}


@needs_gpu
def test_two_streams_of_the_gpu_run_at_once():
    projection, acquire, graphs = on_gpu()
    leases = []
    for _ in range(2):
        with torch.cuda.stream(torch.cuda.Stream()):
            stream, lease = torch.cuda.current_stream(), acquire()
            leases.append((stream, lease))
    assert leases[0][1].buffers is not leases[1][1].buffers
    for step in range(STEPS):
        for stream, lease in leases:
            with torch.cuda.stream(stream):
                run(lease, projection, [step])
    assert graphs.counts == {"captured": 2}
