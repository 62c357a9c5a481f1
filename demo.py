"""Demo: a web page that makes clips from prompts, one at a time, and shows each step of the way."""

from __future__ import annotations

import argparse
import re
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from utils import shipped, start

if __name__ == "__main__":  # before torch is imported
    start.begin()

import torch
from flask import Flask, Response, request, send_file, url_for
from werkzeug.exceptions import BadRequest, HTTPException
from werkzeug.serving import make_server

import utils.web
from model.folders.adapter_words import FORM, HELP
from pipeline.fields import RequestError, schema
from pipeline.generator import VideoGenerator
from pipeline.protocol import Progress
from pipeline.request import FPS, Capabilities, Request, joint_problems, read_request
from trainer.config import Config, generator_model, load
from trainer.decoders import FULL, add_vae_flags, read_tiny_vae
from trainer.serving import Source, capabilities, check_source, load_generator
from utils.cli import USER_ERRORS, command_parser, fail, path_word, start_logging
from utils.config import ConfigError
from utils.data.prompts import read_prompt_file
from utils.errors import UserError
from utils.media.video import save_mp4
from utils.web.jobs import Job, JobQueue, OnNews

PAGE = Path(utils.web.__file__).parent / "page"
SENT = 'send application/json such as {"prompt": "a text", "seed": 0}'
Reply = dict[str, object]  # becomes JSON


@dataclass(frozen=True)
class About:
    """What the page tells of the model."""

    model: str
    steps: int
    network_evaluations: int  # per clip
    examples: Sequence[str]  # prompts to begin with
    request: Reply  # JSON Schema of what can be asked for
    vae: str = FULL  # who makes the pixels
    adapters: Sequence[str] = ()  # on the model, with their strengths


def parser() -> argparse.ArgumentParser:
    """The command line of demo.py."""
    result = command_parser(__doc__)
    result.add_argument(
        "--config_path", type=path_word, default=Path("configs/self_forcing_dmd.yaml"),
        help="the run's YAML file (default: %(default)s)",
    )  # fmt: skip
    result.add_argument(
        "--checkpoint_path", type=path_word, default=Path("checkpoints/self_forcing_dmd.pt"),
        help="a run, or weights (default: %(default)s)",
    )  # fmt: skip
    result.add_argument(
        "--use_ema", action=argparse.BooleanOptionalAction, default=None,
        help="the averaged weights (default: if there are any)",
    )  # fmt: skip
    result.add_argument("--adapter", action="append", default=[], metavar=FORM, help=HELP)
    result.add_argument("--host", default="127.0.0.1", help="0.0.0.0 = open to the network")
    result.add_argument("--port", type=int, default=5001, help="0 = any free one")
    result.add_argument("--fps", type=float, default=None, help="default: the model's")
    add_vae_flags(result)
    result.add_argument("overrides", nargs="*", metavar="key=value", help="settings to override")
    return result


def make_clip(
    generator: VideoGenerator, fps: float, wanted: Request, path: Path, on_news: OnNews
) -> None:
    """Make one job's mp4."""

    def tell(progress: Progress) -> None:
        on_news(progress.stage, progress.done, progress.total)

    clips = generator.clips([wanted], on_progress=tell)
    save_mp4(clips[0], path, fps=fps)


def progress_of(job: Job[Request], steps: int) -> Reply:
    """How far a job is: its network's steps, and its present stage. steps: if not known yet."""
    done = {stage.name: stage for stage in job.stages}
    now, denoise = (job.stages or (None,))[-1], done.get("denoise")
    return {
        "step": denoise.done if denoise else 0,
        "steps": denoise.total if denoise else steps,
        "stage": now.name if now else None,
        "fraction": now.done / now.total if now else 0.0,  # of the stage
    }


def create_app(queue: JobQueue[Request], about: About, model: Capabilities) -> Flask:
    """The page at /, and the API that it talks to below /api."""
    app = Flask(__name__, static_folder=PAGE, static_url_path="/static")
    app.config["MAX_CONTENT_LENGTH"] = 2**16  # bytes

    def news(job: Job[Request]) -> Reply:
        return {
            "prompt": job.payload.prompt,
            "seed": job.payload.seed,
            "request": asked_of(job.payload),
            **{name: getattr(job, name) for name in ("id", "state", "seconds", "error")},
            **progress_of(job, about.steps),
            "position": queue.ahead(job.id),  # jobs that come first
            "video": url_for("video", job_id=job.id) if job.state == "done" else None,
        }

    @app.get("/")
    def page() -> Response:
        return app.send_static_file("index.html")

    @app.get("/api/status")
    def status() -> Reply:
        return asdict(about) | {"queue": queue.waiting()}

    @app.post("/api/jobs")
    def submit() -> tuple[Reply, int]:
        # Only application/json is read: browsers do not let a foreign page send that.
        return news(queue.submit(read_request(read_body(), model))), 202

    @app.get("/api/jobs/<job_id>")
    def look(job_id: str) -> Reply:
        return news(queue.find(job_id))

    @app.delete("/api/jobs/<job_id>")
    def cancel(job_id: str) -> Reply:
        return news(queue.cancel(job_id))

    @app.get("/api/jobs/<job_id>/video")
    def video(job_id: str) -> Response:
        job = queue.find(job_id)
        wanted = job.payload
        words = re.sub(r"[^a-z0-9]+", "-", wanted.prompt.lower())[:60].strip("-") or "clip"
        return send_file(
            queue.result(job_id),
            mimetype="video/mp4",
            as_attachment="download" in request.args,
            download_name=f"{words}-seed{wanted.seed}.mp4",
            max_age=3600,
        )

    @app.errorhandler(RequestError)
    def refuse(error: RequestError) -> tuple[Reply, int]:
        return {"error": str(error), "problems": error.problems}, 400

    @app.errorhandler(HTTPException)
    def explain(error: HTTPException) -> tuple[Reply, int, list[tuple[str, str]]]:
        kept = [(name, value) for name, value in error.get_headers() if name != "Content-Type"]
        return {"error": error.description}, error.code or 500, kept

    return app


def read_body() -> object:
    """The JSON of the present HTTP request. Raises BadRequest if it is none."""
    try:
        body = request.get_json(silent=True)
    except RecursionError:  # thousands of nested brackets
        body = None
    if not isinstance(body, dict):
        raise BadRequest(SENT)
    return body


def asked_of(wanted: Request) -> Reply:
    """The fields that a request sets, as its JSON had them."""
    return {name: value for name, value in vars(wanted).items() if value is not None}


def listen(host: str, port: int) -> socket.socket:
    """Hold the address, and let early callers wait. Raises ConfigError if it cannot be had."""
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port}: {error}; choose another") from error


def describe(
    config: Config, source: Source, generator: VideoGenerator, *, vae: str = FULL
) -> About:
    """What the page tells of a loaded model. Examples are the run's validation prompts, if any.

    vae: who makes the pixels, full or tiny.
    """
    file = shipped.find(Path(config.validation.prompts or ""))
    frames, model = config.latent_shape[1], generator.capabilities
    return About(
        model=Path(generator_model(config)).name,
        steps=generator.pipeline.steps(frames),
        network_evaluations=generator.pipeline.network_evaluations(frames),
        examples=read_prompt_file(file)[:8] if file.is_file() else [],
        request=schema(Request, model),
        vae=vae,
        adapters=[f"{word.path.name}:{word.strength:g}" for word, _ in source.adapters],
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for values that mean nothing."""
    try:
        if args.fps is not None:
            FPS.parse(args.fps)
    except UserError as error:
        raise ConfigError(f"--fps: {error}") from error
    if not args.host:
        raise ConfigError("--host: must be an address; 0.0.0.0 = open to the network")


def check_model(model: Capabilities, path: Path) -> None:
    """Raise ConfigError unless the model at `path` makes clips of a prompt alone, and can here."""
    if model.images:
        raise ConfigError(
            f"generator.model: {path} makes clips from images, and this page asks for none; use "
            f"inference.py --i2v"
        )
    for problem in joint_problems(Request("-"), model, name_of=lambda _: "latent_shape"):
        raise ConfigError(problem)


def serve(args: argparse.Namespace) -> None:
    """Check the words, load the model, answer until Ctrl-C."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_arguments(args)
    config = load(args.config_path, args.overrides)
    source = check_source(config, args.checkpoint_path, use_ema=args.use_ema, adapters=args.adapter)
    check_model(capabilities(source.run, device), source.model.path)
    tiny_vae = read_tiny_vae(args, source.model)
    address = listen(args.host, args.port)
    generator = load_generator(source, device, tiny_vae=tiny_vae)
    fps = source.model.fps if args.fps is None else args.fps
    about = describe(config, source, generator, vae=args.vae)
    work = partial(make_clip, generator, fps)
    with TemporaryDirectory("-demo") as folder, closing(JobQueue(work, Path(folder))) as queue:
        app, fd = create_app(queue, about, generator.capabilities), address.fileno()
        server = make_server(args.host, args.port, app, threaded=True, fd=fd)
        print(f"Fewstep demo: http://{args.host}:{server.port} (Ctrl-C to stop)", flush=True)
        server.serve_forever()  # returns on Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Load a model and serve the page until Ctrl-C or SIGTERM; returns the exit status."""
    args = parser().parse_intermixed_args(arguments)
    start_logging()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve(args)
    except USER_ERRORS as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
