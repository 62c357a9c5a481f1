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
from trainer.config import Config, generator_model, load
from trainer.serving import Request, VideoGenerator, check_source, load_generator
from utils.cli import USER_ERRORS, command_parser, fail, start_logging
from utils.config import ConfigError
from utils.data.prompts import read_prompt_file
from utils.media.video import save_mp4
from utils.web.jobs import Job, JobQueue, OnStep

PAGE = Path(utils.web.__file__).parent / "page"
MAX_PROMPT = 2000  # characters
MAX_SEED = 2**53 - 1  # beyond it, whole numbers in a browser are not exact
Reply = dict[str, object]  # becomes JSON


@dataclass(frozen=True)
class About:
    """What the page tells of the model."""

    model: str
    steps: int
    network_evaluations: int  # per clip
    examples: Sequence[str]  # prompts to begin with


def parser() -> argparse.ArgumentParser:
    """The command line of demo.py."""
    result = command_parser(__doc__)
    result.add_argument(
        "--config_path", type=Path, default=Path("configs/self_forcing_dmd.yaml"),
        help="the run's YAML file (default: %(default)s)",
    )  # fmt: skip
    result.add_argument(
        "--checkpoint_path", type=Path, default=Path("checkpoints/self_forcing_dmd.pt"),
        help="a run, or weights (default: %(default)s)",
    )  # fmt: skip
    result.add_argument(
        "--use_ema", action=argparse.BooleanOptionalAction, default=None,
        help="the averaged weights (default: if there are any)",
    )  # fmt: skip
    result.add_argument("--host", default="127.0.0.1", help="0.0.0.0 = open to the network")
    result.add_argument("--port", type=int, default=5001, help="0 = any free one")
    result.add_argument("--fps", type=float, default=16.0)
    result.add_argument("overrides", nargs="*", metavar="key=value", help="settings to override")
    return result


def make_clip(generator: VideoGenerator, fps: float, job: Job, path: Path, on_step: OnStep) -> None:
    """Make one job's mp4."""
    clips = generator.clips([Request(job.prompt, job.seed)], on_step=on_step)
    save_mp4(clips[0], path, fps=fps)


def create_app(queue: JobQueue, about: About) -> Flask:
    """The page at /, and the API that it talks to below /api."""
    app = Flask(__name__, static_folder=PAGE, static_url_path="/static")
    app.config["MAX_CONTENT_LENGTH"] = 2**16  # bytes

    def news(job: Job) -> Reply:
        return asdict(job) | {
            "steps": job.steps or about.steps,
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
        wanted = read_request(request.get_json(silent=True))
        return news(queue.submit(wanted.prompt, wanted.seed)), 202

    @app.get("/api/jobs/<job_id>")
    def look(job_id: str) -> Reply:
        return news(queue.find(job_id))

    @app.delete("/api/jobs/<job_id>")
    def cancel(job_id: str) -> Reply:
        return news(queue.cancel(job_id))

    @app.get("/api/jobs/<job_id>/video")
    def video(job_id: str) -> Response:
        job = queue.find(job_id)
        words = re.sub(r"[^a-z0-9]+", "-", job.prompt.lower())[:60].strip("-") or "clip"
        return send_file(
            queue.result(job_id),
            mimetype="video/mp4",
            as_attachment="download" in request.args,
            download_name=f"{words}-seed{job.seed}.mp4",
            max_age=3600,
        )

    @app.errorhandler(HTTPException)
    def explain(error: HTTPException) -> tuple[Reply, int, list[tuple[str, str]]]:
        kept = [(name, value) for name, value in error.get_headers() if name != "Content-Type"]
        return {"error": error.description}, error.code or 500, kept

    return app


def read_request(body: object) -> Request:
    """The clip that a request's JSON body asks for. Raises BadRequest."""
    if not isinstance(body, dict) or set(body) != {"prompt", "seed"}:
        raise BadRequest('send application/json: {"prompt": a text, "seed": a whole number}')
    prompt, seed = body["prompt"], body["seed"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRequest("prompt: must be a text that is not empty")
    if len(prompt) > MAX_PROMPT:
        raise BadRequest(f"prompt: at most {MAX_PROMPT} characters, this one has {len(prompt)}")
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:  # True is an int, too
        raise BadRequest(f"seed: must be a whole number from 0 to {MAX_SEED}, got {seed!r:.40}")
    return Request(prompt.strip(), seed)


def listen(host: str, port: int) -> socket.socket:
    """Hold the address, and let early callers wait. Raises ConfigError if it cannot be had."""
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port}: {error}; choose another") from error


def describe(config: Config, generator: VideoGenerator) -> About:
    """What the page tells of a loaded model. Examples are the run's validation prompts, if any."""
    file = shipped.find(Path(config.validation.prompts or ""))
    frames = config.latent_shape[1]
    return About(
        model=Path(generator_model(config)).name,
        steps=generator.pipeline.steps(frames),
        network_evaluations=generator.pipeline.network_evaluations(frames),
        examples=read_prompt_file(file)[:8] if file.is_file() else [],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Load a model and serve the page until Ctrl-C or SIGTERM; returns the exit status."""
    args = parser().parse_intermixed_args(arguments)
    start_logging()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = load(args.config_path, args.overrides)
        source = check_source(config, args.checkpoint_path, use_ema=args.use_ema)
        if source.folder.images is not None:
            raise ConfigError(
                f"generator.model: {source.folder.path} makes clips from images, and this page "
                f"asks for none; use inference.py --i2v"
            )
        if not args.fps > 0:
            raise ConfigError(f"--fps: must be positive, got {args.fps}")
        address = listen(args.host, args.port)
        generator = load_generator(config, source, device)
        about, work = describe(config, generator), partial(make_clip, generator, args.fps)
        with TemporaryDirectory("-demo") as folder, closing(JobQueue(work, Path(folder))) as queue:
            app, fd = create_app(queue, about), address.fileno()
            server = make_server(args.host, args.port, app, threaded=True, fd=fd)
            print(f"Fewstep demo: http://{args.host}:{server.port} (Ctrl-C to stop)", flush=True)
            server.serve_forever()  # returns on Ctrl-C
    except USER_ERRORS as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(start.run(main))
