"""A process that is forked while another thread is in the middle of a step."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from tiny_pipelines import build, run

import lesa

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@pytest.mark.parametrize("tap", ["output", "hidden"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_forked_inside_a_step_makes_its_own_picture(tap):
    pipe, call = build("flux")
    schedule, threads = lesa.Schedule.fora(3), torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
    with lesa.accelerate(pipe, lesa.Taylor(1), schedule=schedule, tap=tap):
        expected = run(pipe, call())
    inside, leave = threading.Event(), threading.Event()

    def wait(module, inputs, output):
        inside.set()
        leave.wait(60)

    lesa.enable(pipe, lesa.Taylor(1), schedule=schedule, tap=tap)
    hook = pipe.transformer.norm_out.register_forward_hook(wait)
    thread = threading.Thread(target=lambda: run(pipe, call()))
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if child == 0:  # nothing of pytest's may run here
        status = 3
        try:
            hook.remove()
            lesa.stats(pipe)
            status = 0 if torch.equal(run(pipe, call()), expected) else 1
        finally:
            os._exit(status)
    end = time.monotonic() + 60
    ended, status = 0, 0
    while not ended and time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.05)
    leave.set()
    thread.join(60)
    torch.set_num_threads(threads)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended and os.waitstatus_to_exitcode(status) == 0
    assert lesa.stats(pipe).generations == 1  # the child counts for itself
