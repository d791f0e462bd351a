"""A server that does with a trace what NDIF does, in a process of its own that cannot import this package.

It speaks nnsight's protocol (a websocket at /subscribe, a form at /request), builds the model from the key, lays the
block out on it, runs it, and sends back what the block saved. `python ndif_server.py`; it prints its port.
"""

import asyncio
import io
import json
import sys
import traceback

ABSENT = ("interp_vlm", "tests", "jaxtyping", "beartype")


class Absent:
    """What the machines of NDIF do not have."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Absent())

import torch  # noqa: E402
import zstandard  # noqa: E402
from nnsight.modeling.mixins.remotable import Remotable  # noqa: E402
from nnsight.schema.request import RequestModel  # noqa: E402
from nnsight.schema.response import ResponseModel, Status  # noqa: E402
from nnsight.tracing.tracer import _saves, dec, inc  # noqa: E402
from tornado.httpserver import HTTPServer  # noqa: E402
from tornado.netutil import bind_sockets  # noqa: E402
from tornado.web import Application, RequestHandler  # noqa: E402
from tornado.websocket import WebSocketHandler  # noqa: E402
from transformers import (  # noqa: E402
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
    Qwen2VLProcessor,
)

LARGE = 2**30
subscribers, models = {}, {}


class Still(Qwen2VLProcessor):
    """A processor for a folder that says nothing of videos."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor, tokenizer):
        ProcessorMixin.__init__(self, image_processor, tokenizer)


def processor_of(folder):
    try:
        return AutoProcessor.from_pretrained(folder)
    except OSError:
        return Still(AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


def run(request, blob):
    """The values that the block saved, as nnsight's clients expect them."""
    key = request["model_key"]
    if key not in models:
        folder = json.loads(key.split(":", 1)[1])["repo_id"]
        models[key] = Remotable.from_model_key(key, dispatch=True, dtype=torch.float32, processor=processor_of(folder))
        models[key]._module.requires_grad_(False)
    model = models[key]
    model._remoteable_set_env(request["env"])
    tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), compress=request["compress"])
    inc()
    try:
        tracer.execute(tracer.info.code)
        saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
    finally:
        dec()
    with io.BytesIO() as file:
        torch.save(saved, file)
        content = file.getvalue()
    return zstandard.ZstdCompressor().compress(content) if request["compress"] else content


class Here(RequestHandler):
    def get(self):
        self.write("up")


class Subscribe(WebSocketHandler):
    def open(self):
        subscribers[str(id(self))] = self
        self.write_message(json.dumps({"session_id": str(id(self))}))


class Jobs(RequestHandler):
    def post(self):
        request = json.loads(self.get_body_argument("data"))
        if "refused" in request["model_key"]:
            self.set_status(503)
            self.write({"detail": "no such model is deployed"})
            return
        blob = self.request.files["blob"][0]["body"]
        self.write(ResponseModel(id="1", status=Status.RECEIVED).model_dump_json())
        self.finish()
        try:
            answer = ResponseModel(id="1", status=Status.COMPLETED, data=run(request, blob)).pickle()
        except Exception:
            answer = ResponseModel(id="1", status=Status.ERROR, description=traceback.format_exc()).model_dump_json()
        subscribers[request["session_id"]].write_message(answer, binary=isinstance(answer, bytes))


async def main():
    torch.set_num_threads(1)
    (socket,) = bind_sockets(0, "127.0.0.1")
    routes = [("/", Here), ("/subscribe", Subscribe), ("/request", Jobs)]
    HTTPServer(Application(routes), max_buffer_size=LARGE).add_socket(socket)
    sys.stdout.write(f"{socket.getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
