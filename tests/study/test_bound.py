"""The bound on a process, with memory that is really refused, in processes of their own."""

import json
import subprocess
import sys

import pytest

from interp_vlm.errors import DataError, ModelError, StudyError
from interp_vlm.study.bound import TooLittleMemory, bounded, in_bytes

GIB = 2**30
SCRIPT = """
import json, resource
import torch
from interp_vlm.engine.memory import budget, held, left_to_process
from interp_vlm.study.bound import TooLittleMemory, bounded, spare

BOUND, MINE = 2**30, 3 * 2**30
def fill(pieces): return len([torch.ones(2**22) for _ in range(pieces)])

free, found = spare(BOUND), {}
with bounded(BOUND, free):
    found["left"], found["budget"] = left_to_process(), budget(None, torch.device("cpu"))
    try:
        fill(100)
    except RuntimeError as error:
        found["inside"] = str(error)
try:
    with bounded(BOUND, free):
        fill(100)
except TooLittleMemory as error:
    found["error"] = str(error)
found["peak"] = held()["VmHWM"]
found["outside"] = fill(100)
found["beyond"] = held()["VmHWM"]
resource.setrlimit(resource.RLIMIT_DATA, (MINE, MINE))
with bounded(2**40, free):
    found["mine"] = resource.getrlimit(resource.RLIMIT_DATA)
found["after"] = resource.getrlimit(resource.RLIMIT_DATA)
print(json.dumps(found))
"""


def test_memory_beyond_the_bound_is_refused_and_the_process_goes_on():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert "DefaultCPUAllocator" in found["inside"]
    assert found["error"].startswith("a worker's memory of 1.00 GiB on ")
    assert "raise --memory-per-worker" in found["error"]
    assert GIB - 2**28 < found["peak"] <= GIB
    assert (found["outside"], found["beyond"] > GIB) == (100, True), "without the bound there was room"
    assert found["budget"] == pytest.approx(found["left"] / 4, rel=0.01)
    assert found["left"] < GIB
    assert found["mine"] == found["after"] == [3 * GIB, 3 * GIB], "a limit that was there is not raised"


def test_errors_that_hide_memory_and_errors_that_speak_for_themselves():
    hidden = ModelError("the model cannot be loaded")
    hidden.__cause__ = MemoryError("no more")
    with pytest.raises(TooLittleMemory, match=r"a worker's memory on \S+ is too little \(no more\)"), bounded(None):
        raise hidden
    with pytest.raises(TooLittleMemory, match="failed to map segment"), bounded(None):
        raise ImportError("torch.so: failed to map segment from shared object")
    for own in (DataError("too little memory for one example"), ModelError("no such folder"), ValueError("other")):
        with pytest.raises(type(own)) as caught, bounded(None):
            raise own
        assert caught.value is own


@pytest.mark.parametrize("size", ["2 apples", "0GiB", -1])
def test_sizes_that_are_none(size):
    with pytest.raises(StudyError, match="expected bytes, or a size such as '2GiB'"):
        in_bytes(size)
    assert in_bytes("1.5GiB") == 1.5 * GIB
