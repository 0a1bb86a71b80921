"""The port of the page."""

from __future__ import annotations

import asyncio
import logging
import os
import socket

import pytest

from lesa.errors import LesaError
from lesa.play.server import HOST, _told, address, listening, quiet_gradio


def test_only_this_machine_is_served_and_a_port_once():
    with listening(0) as door:
        port = door.getsockname()[1]
        assert address(door) == f"http://{HOST}:{port}" and door.getsockname()[0] == "127.0.0.1"
        with pytest.raises(LesaError, match=f"port={port}: it is in use; give another, or 0"):
            listening(port)
    with listening(port) as door:  # at once, although it was just in use
        assert door.getsockname()[1] == port


def test_the_port_of_a_server_on_all_addresses_is_in_use_too():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with pytest.raises(LesaError, match="it is in use"):
            listening(other.getsockname()[1])


@pytest.mark.parametrize("port", [-1, 65536])
def test_what_is_no_port_is_refused(port):
    with pytest.raises(LesaError, match=f"port={port}: no port"):
        listening(port)


def test_gradio_is_told_to_be_quiet_and_leaves_no_files(monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    with quiet_gradio():
        folder = os.environ["GRADIO_TEMP_DIR"]
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False" and os.path.isdir(folder)
    assert not os.path.exists(folder) and "GRADIO_TEMP_DIR" not in os.environ
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "True"


@pytest.mark.parametrize(("error", "told"), [(asyncio.CancelledError, False), (ValueError, True)])
def test_requests_that_ctrl_c_cuts_off_leave_no_traceback(error, told):
    info = (error, error("graceful shutdown exceeded"), None)
    record = logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, "Exception", (), info)
    assert _told(record) is told
