"""Random requests of a soak: what users ask of pipelines that stay enabled for hours.

`draw_request` draws one; `serve` makes its picture on whatever pipelines it is given, and says
which picture that is by a digest. A request holds all that its picture depends on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import diffusers
import torch
from tiny_pipelines import build, draw

import lesa
from lesa import LesaError, testbed

NAMES = ("flux", "sdxl")
EVENTS = ("raise", "close", "interrupt", "prompt", "latents", "nested")
GUIDED = 5.0  # of FLUX: the denoiser is called twice a step
SCHEDULERS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "flux": {
        "own": lambda own: type(own).from_config(own.config),
        "shift": lambda own: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "stochastic": lambda own: diffusers.FlowMatchEulerDiscreteScheduler(
            stochastic_sampling=True
        ),
    },
    "sdxl": {
        "own": lambda own: type(own).from_config(own.config),
        "ddim": lambda own: diffusers.DDIMScheduler(),
        "dpm++": lambda own: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
        "ancestral": lambda own: diffusers.EulerAncestralDiscreteScheduler(),
        "pndm": lambda own: diffusers.PNDMScheduler(skip_prk_steps=True),
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "taylor-1 hidden": {"forecaster": "taylor-1", "tap": "hidden", "full_steps": 4},
    "taylor-2": {"forecaster": "taylor-2", "full_steps": 4},
    "fora": {"forecaster": "fora", "schedule": lesa.Schedule.fora(3)},
    "fora hidden": {"forecaster": "fora", "schedule": lesa.Schedule.fora(3), "tap": "hidden"},
    "hicache": {"forecaster": "hicache", "schedule": lesa.Schedule.every(3)},
}


class Stop(Exception):
    """What a user's stop button raises."""


@dataclass(frozen=True)
class Request:
    """One call of a pipeline, and what happens inside of it.

    `method` is None without lesa, else a key of the methods in `Pipelines`. `event` is None or one
    of `EVENTS`, at the end of step `when`; a nested one is the same request on a sibling.
    """

    name: str
    method: str | None
    scheduler: str
    steps: int
    size: int
    batch: int
    guidance: float
    prompt: int
    seed: int
    image: bool = False
    loop: bool = False
    decoded: bool = False
    event: str | None = None
    when: int = 0


def draw_request(random: Random, methods: list[str]) -> Request:
    """The next request of a generator, for one of these methods or none."""
    name = random.choices(NAMES, (1, 2))[0]
    steps = random.randint(6, 12)
    loop = name == "sdxl" and random.random() < 0.15
    event = random.choice(EVENTS) if random.random() < 0.4 else None
    if event == "close" and not loop:
        event = "raise"
    if loop and event is not None:
        event = "close"
    return Request(
        name=name,
        method=None if random.random() < 0.08 else random.choice(methods),
        scheduler="own" if random.random() < 0.5 else random.choice([*SCHEDULERS[name]]),
        steps=steps,
        size=random.choice((32, 48, 64)) if name == "flux" else random.choice((8, 16, 24)),
        batch=random.choice((1, 1, 2)),
        guidance=random.choice((1.0, 3.5, GUIDED)),
        prompt=random.randrange(4),
        seed=random.randrange(4),
        image=not loop and random.random() < 0.25,
        loop=loop,
        decoded=not loop and random.random() < 0.2,
        event=event,
        when=random.randrange(steps // 2 - 1),
    )


class Pipelines:
    """The embedded FLUX and a tiny SDXL with batched guidance, and their siblings from_pipe.

    `made` are pipelines that share nothing with others; `trained` are forecasters by the name of
    the pipeline and their own.
    """

    def __init__(self, made: dict[str, Any], trained: dict[str, dict[str, Any]]) -> None:
        self.made, self.trained = made, trained
        self.own = {name: made[name].scheduler for name in NAMES}
        self.siblings: dict[str, Any] = {}

    @classmethod
    def load(cls, trained: dict[str, dict[str, Any]] | None = None) -> Pipelines:
        """Loaded anew: nothing of them has run yet."""
        made = {"flux": testbed.load("flux"), "sdxl": build("sdxl")[0]}
        return cls(made, trained or {name: {} for name in NAMES})

    def fresh(self) -> Pipelines:
        """The same weights with no past: copies of the denoisers, schedulers of their own."""
        made = {}
        for name, pipe in self.made.items():
            part = "transformer" if name == "flux" else "unet"
            model = pipe.components[part]
            copy = type(model).from_config(model.config).eval()
            copy.load_state_dict(model.state_dict())
            parts = {part: copy, "scheduler": SCHEDULERS[name]["own"](self.own[name])}
            made[name] = quiet(type(pipe)(**{**pipe.components, **parts}))
        return Pipelines(made, self.trained)

    def config(self, request: Request) -> dict[str, Any]:
        """The options of `lesa.enable` for a request."""
        trained = self.trained[request.name].get(str(request.method))
        return {"forecaster": trained} if trained else METHODS[str(request.method)]

    def pipe(self, request: Request, *, renew: bool = False) -> Any:
        """The pipeline that a request is for, with its scheduler; a new sibling with `renew`."""
        pipe = self.made[request.name]
        pipe.scheduler = SCHEDULERS[request.name][request.scheduler](self.own[request.name])
        if not request.image:
            return pipe
        if renew or request.name not in self.siblings:
            self.siblings[request.name] = from_image(pipe)
        self.siblings[request.name].scheduler = pipe.scheduler
        return self.siblings[request.name]


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def from_image(pipe: Any) -> Any:
    """The img2img pipeline on the same parts, which lesa was never told of."""
    kinds = {
        diffusers.FluxPipeline: diffusers.FluxImg2ImgPipeline,
        diffusers.StableDiffusionXLPipeline: diffusers.StableDiffusionXLImg2ImgPipeline,
    }
    return quiet(kinds[type(pipe)].from_pipe(pipe))


def arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """Those of the pipeline's call."""
    call: dict[str, Any] = {
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "generator": torch.Generator().manual_seed(request.seed),
        "output_type": "np" if request.decoded else "latent",
    }
    if request.name == "flux":
        texts = testbed.captions(8, seed=3)[request.prompt :]
        call |= {"prompt": texts[: request.batch], "max_sequence_length": 20}
        if request.guidance == GUIDED:
            call |= {"negative_prompt": [" "] * request.batch, "true_cfg_scale": 2.0}
    else:
        call |= embeddings(request)
    size = (request.size, request.size)
    if request.image:
        call |= {"image": draw(1, 3, *size).sigmoid(), "strength": 0.75}
    if not request.image or request.name == "flux":
        call |= dict(zip(("height", "width"), size, strict=True))
    return call


def embeddings(request: Request) -> dict[str, torch.Tensor]:
    """Prompt embeddings of the tiny SDXL, negative ones included."""
    shapes = {"prompt_embeds": (6, 16), "pooled_prompt_embeds": (16,)}
    seeds = {"": request.prompt, "negative_": 50}
    return {
        sign + name: draw(request.batch, *shape, seed=seed)
        for sign, seed in seeds.items()
        for name, shape in shapes.items()
    }


def own_loop(pipe: Any, request: Request) -> Iterator[torch.Tensor]:
    """A loop of one's own as a generator: the latents after every step, guidance batched."""
    given = embeddings(request)
    both = {
        name: torch.cat([given[f"negative_{name}"], given[name]])
        for name in ("prompt_embeds", "pooled_prompt_embeds")
    }
    added = {
        "text_embeds": both["pooled_prompt_embeds"],
        "time_ids": torch.tensor([[request.size, request.size, 0, 0] + [request.size] * 2] * 2)
        .repeat_interleave(request.batch, 0)
        .float(),
    }
    scheduler = pipe.scheduler
    scheduler.set_timesteps(request.steps)
    noise = draw(request.batch, 4, request.size, request.size, seed=request.seed)
    latents = noise * scheduler.init_noise_sigma
    extra = {}
    if request.scheduler in ("ddim", "ancestral"):
        extra = {"generator": torch.Generator().manual_seed(request.seed)}
    for time in scheduler.timesteps:
        with torch.no_grad():
            given_latents = scheduler.scale_model_input(torch.cat([latents] * 2), time)
            found = pipe.unet(
                given_latents, time, both["prompt_embeds"], added_cond_kwargs=added
            ).sample
        without, with_prompt = found.chunk(2)
        guided = without + request.guidance * (with_prompt - without)
        latents = scheduler.step(guided, time, latents, **extra).prev_sample
        yield latents


def serve(pipes: Pipelines, request: Request, *, renew: bool = False) -> str:
    """A digest of the picture that a request ends in, or of how it ended."""
    pipe = pipes.pipe(request, renew=renew)
    # The process's one source of noise is behind a lock, which a forked child may find shut.
    if request.scheduler == "stochastic":
        torch.manual_seed(request.seed)
    if request.loop:
        return _serve_loop(pipe, request)
    inner: list[str] = []

    def callback(_: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        return _event(pipe, request, values, inner) if index == request.when else {}

    call = arguments(pipe, request)
    if request.event is not None:
        names = ["latents", *(["prompt_embeds"] if request.event == "prompt" else [])]
        call |= {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    try:
        picture = torch.as_tensor(pipe(**call)[0])
    except Stop:
        return "stopped"
    except LesaError as error:  # the guidance of a call that a trained forecaster does not know
        return f"refused: {error}"
    return "+".join([digest(picture), *inner])


def _serve_loop(pipe: Any, request: Request) -> str:
    steps = own_loop(pipe, request)
    latents = next(steps)
    for index, latents in enumerate(steps, 1):
        if request.event == "close" and index > request.when:
            steps.close()
            return "closed " + digest(latents)
    return digest(latents)


def _event(pipe: Any, request: Request, values: dict[str, Any], inner: list[str]) -> dict[str, Any]:
    """What happens at the end of a step."""
    match request.event:
        case "raise":
            raise Stop
        case "interrupt":
            pipe._interrupt = True
        case "prompt":
            return {"prompt_embeds": values["prompt_embeds"] * 1.5}
        case "latents":
            return {"latents": values["latents"] * 0.5}
        case "nested":
            inner.append(nested(pipe, request))
    return {}


def nested(pipe: Any, request: Request) -> str:
    """The same request on a sibling with a scheduler of its own, from inside a run of `pipe`."""
    if request.scheduler == "stochastic":
        torch.manual_seed(request.seed)
    own = type(pipe.scheduler).from_config(pipe.scheduler.config)
    sibling = quiet(type(pipe)(**{**pipe.components, "scheduler": own}))
    return digest(torch.as_tensor(sibling(**arguments(sibling, inside(request)))[0]))


def inside(request: Request) -> Request:
    """The request that a nested one makes inside of its run."""
    return replace(request, event=None, decoded=False)


def digest(picture: torch.Tensor) -> str:
    """Of every bit of it; says where it is not finite."""
    data = picture.detach().contiguous()
    told = "" if bool(data.isfinite().all()) else "not finite "
    return told + hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
