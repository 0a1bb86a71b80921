"""A server whose requests say what they may cost: full steps, a speed-up or a quality.

python examples/server.py  # needs pip install ".[examples]"
curl -o fast.png "127.0.0.1:8000/picture?prompt=a+blue+square&quality=fast"
curl "127.0.0.1:8000/metrics"
"""

import io
import threading
import time

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

import lesa

# or: FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
pipe = lesa.testbed.load()
call = lesa.testbed.settings()
lesa.enable(pipe, full_steps=10)  # or lesa.enable(pipe, "my-lesa"): what holds for a bare request
app, alone = FastAPI(), threading.Lock()  # one generation at a time; docs/serving.md has more


@app.get("/picture")
def picture(
    prompt: str,
    seed: int = 0,
    full_steps: int | None = None,
    target_speedup: float | None = None,
    quality: str | None = None,  # "best", "balanced" or "fast"
) -> Response:
    """A PNG; its headers say what it cost."""
    budget = {"full_steps": full_steps, "target_speedup": target_speedup, "quality": quality}
    with alone, lesa.options(**budget):
        noise, start = torch.Generator().manual_seed(seed), time.perf_counter()
        image = pipe(prompt, generator=noise, **call).images[0]
        seconds, steps = time.perf_counter() - start, len(lesa.stats(pipe).full_steps)
    image.save(file := io.BytesIO(), "png")
    headers = {"X-Full-Steps": f"{steps}", "X-Seconds": f"{seconds:.3f}"}
    return Response(file.getvalue(), media_type="image/png", headers=headers)


@app.exception_handler(lesa.LesaError)
def refused(request: Request, error: lesa.LesaError) -> JSONResponse:
    """A budget that cannot be had: one sentence that says what can."""
    return JSONResponse({"detail": str(error)}, status_code=422)


@app.get("/metrics")
def metrics() -> PlainTextResponse:
    """All counters of lesa, for Prometheus."""
    counters = lesa.stats(pipe).as_dict().items()
    return PlainTextResponse("".join(f"{name} {value}\n" for name, value in counters))


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=8000)
