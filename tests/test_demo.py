"""The demo: its API on a generator in miniature, its page in a browser, its command line."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import imageio.v3 as iio
import pytest
import torch
from flask.testing import FlaskClient
from torch import Tensor
from werkzeug.serving import make_server

import demo
import utils.web.jobs
from demo import PAGE, About, create_app, describe, make_clip
from model.folders.adapter_writing import write_adapter
from model.types import LatentSpec
from pipeline.fields import schema
from pipeline.generator import VideoGenerator
from pipeline.protocol import OnProgress, Progress
from pipeline.request import Capabilities, Request
from pipeline.teacher import SamplingConfig
from tests.adapters import random_factors
from tests.commands import main_and_stderr
from tests.conftest import MINIATURE
from tests.disks import largest_file
from tests.ranks import run_on_ranks
from trainer.config import load
from trainer.serving import check_source, load_generator
from utils.seeding import generator
from utils.web.jobs import JobQueue

ROOT = Path(demo.__file__).resolve().parent
CONFIG = ROOT / "configs" / "tiny" / "dmd.yaml"
STEPS, FRAMES = 4, 5
STUDENT = Capabilities(LatentSpec(16, 4, 8, (2, 2)), (32, 32), 17, STEPS)
TEACHER = replace(STUDENT, sampling=SamplingConfig(steps=STEPS))
EXAMPLES = ["a red circle", "a green bar"]
ABOUT = About("Miniature", STEPS, 2 * STEPS, EXAMPLES, schema(Request, STUDENT))
BROWSER = shutil.which("chromium")


class Miniature:
    """Stands in for a VideoGenerator: it does a step only when the test allows one.

    Order, progress and cancelling are about what happens between two steps of a model; a real one
    takes them when it likes. The prompt "fail" raises after the first step.
    """

    def __init__(self) -> None:
        self.allowed = threading.Semaphore(0)
        self.steps_of: dict[str, int] = {}  # prompt -> steps done, in order of arrival here

    def allow(self, steps: int = 1000) -> None:
        self.allowed.release(steps)

    def clips(self, requests: Sequence[Request], *, on_progress: OnProgress) -> Tensor:
        (request,) = requests
        for step in range(1, STEPS + 1):
            self.allowed.acquire()
            self.steps_of[request.prompt] = step
            if request.prompt == "fail":
                raise RuntimeError("out of memory\nand much more")
            on_progress(Progress("denoise", step, STEPS))
        on_progress(Progress("decode", 1, 2))
        if request.prompt == "slow to decode":
            self.allowed.acquire()
        on_progress(Progress("decode", 2, 2))
        rng = generator(request.prompt, request.seed)
        return torch.rand(1, 3, FRAMES, 16, 16, generator=rng)


@dataclass
class Demo:
    """A demo on a miniature, and what tests ask of it."""

    miniature: Miniature
    queue: JobQueue[Request]
    client: FlaskClient
    folder: Path

    def submit(self, prompt: str, seed: int = 0) -> str:
        reply = self.client.post("/api/jobs", json={"prompt": prompt, "seed": seed})
        assert reply.status_code == 202, reply.json
        return str(reply.get_json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        reply = self.client.get(f"/api/jobs/{job_id}")
        assert reply.status_code == 200, reply.json
        return dict(reply.get_json())

    def until(self, job_id: str, **wanted: object) -> dict[str, Any]:
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            job = self.job(job_id)
            if all(job[key] == value for key, value in wanted.items()):
                return job
            time.sleep(0.005)
        raise AssertionError(f"never {wanted}: {job}")


@pytest.fixture
def tried(tmp_path: Path) -> Iterator[Demo]:
    miniature = Miniature()
    work = partial(make_clip, cast(VideoGenerator, miniature), 8.0)
    with closing(JobQueue(work, tmp_path)) as queue:
        client = create_app(queue, ABOUT, STUDENT).test_client()
        yield Demo(miniature, queue, client, tmp_path)
        miniature.allow()


def test_a_prompt_becomes_a_video_that_plays(tried: Demo) -> None:
    tried.miniature.allow()
    job = tried.until(tried.submit("a red circle", 7), state="done")
    assert (job["step"], job["steps"], job["error"]) == (STEPS, STEPS, None)
    reply = tried.client.get(job["video"])
    assert reply.content_type == "video/mp4"
    frames = iio.imread(reply.data, extension=".mp4")
    assert frames.shape == (FRAMES, 256, 256, 3)


def test_a_download_is_named_after_its_prompt_and_seed(tried: Demo) -> None:
    tried.miniature.allow()
    job_id = tried.submit("A red circle,\n../left!", 7)
    tried.until(job_id, state="done")
    reply = tried.client.get(f"/api/jobs/{job_id}/video?download=1")
    expected = "attachment; filename=a-red-circle-left-seed7.mp4"
    assert reply.headers["Content-Disposition"] == expected


def test_status_tells_of_the_model(tried: Demo) -> None:
    assert tried.client.get("/api/status").json == {
        "model": "Miniature",
        "steps": STEPS,
        "network_evaluations": 2 * STEPS,
        "examples": ["a red circle", "a green bar"],
        "request": schema(Request, STUDENT),
        "adapters": [],
        "vae": "full",
        "queue": 0,
    }


def test_progress_is_told_step_by_step(tried: Demo) -> None:
    job_id = tried.submit("a red circle")
    tried.until(job_id, state="running", step=0, steps=STEPS)
    for step in range(1, STEPS):
        tried.miniature.allow(1)
        tried.until(job_id, state="running", step=step)


def test_decoding_is_a_stage_of_its_own_and_leaves_the_steps_as_they_are(tried: Demo) -> None:
    job_id = tried.submit("slow to decode")
    tried.miniature.allow(STEPS)
    tried.until(job_id, stage="decode", fraction=0.5, step=STEPS, steps=STEPS)
    tried.miniature.allow()
    tried.until(job_id, state="done", stage="decode", fraction=1.0, step=STEPS)


def test_jobs_wait_in_order_of_arrival(tried: Demo) -> None:
    first, second, third = (tried.submit(prompt) for prompt in ("one", "two", "three"))
    tried.until(first, state="running", position=0)
    assert [tried.job(x)["position"] for x in (second, third)] == [1, 2]
    assert tried.client.get("/api/status").get_json()["queue"] == 2
    tried.miniature.allow()
    tried.until(third, state="done")
    assert list(tried.miniature.steps_of) == ["one", "two", "three"]


def test_a_cancelled_job_in_the_queue_never_runs(tried: Demo) -> None:
    first, second, third = (tried.submit(prompt) for prompt in ("one", "two", "three"))
    assert tried.client.delete(f"/api/jobs/{second}").get_json()["state"] == "cancelled"
    assert tried.job(third)["position"] == 1
    tried.miniature.allow()
    tried.until(third, state="done")
    tried.until(first, state="done")
    assert list(tried.miniature.steps_of) == ["one", "three"]


def test_a_cancelled_running_job_stops_at_its_next_step(tried: Demo) -> None:
    first, second = tried.submit("one"), tried.submit("two")
    tried.miniature.allow(1)
    tried.until(first, step=1)
    assert tried.client.delete(f"/api/jobs/{first}").get_json()["state"] == "cancelled"
    tried.miniature.allow()
    tried.until(second, state="done")
    assert tried.miniature.steps_of == {"one": 2, "two": STEPS}
    assert tried.job(first)["state"] == "cancelled"
    assert [path.stem for path in tried.folder.iterdir()] == [second]


def test_a_failure_fails_its_own_job_with_a_line_and_the_next_one_runs(tried: Demo) -> None:
    tried.miniature.allow()
    failed, following = tried.submit("fail"), tried.submit("two")
    tried.until(following, state="done")
    job = tried.job(failed)
    assert (job["state"], job["error"]) == ("failed", "RuntimeError: out of memory")


def test_a_full_disk_fails_the_job_and_leaves_no_half_clip(tried: Demo) -> None:
    tried.miniature.allow()
    with largest_file(2**11):
        job = tried.until(tried.submit("a red circle"), state="failed")
    assert job["error"].startswith("OSError: [Errno 27] File too large: ")
    assert (job["video"], list(tried.folder.iterdir())) == (None, [])
    tried.until(tried.submit("a red circle"), state="done")


def test_a_clip_that_someone_removed_is_told_as_such(tried: Demo) -> None:
    tried.miniature.allow()
    job = tried.until(tried.submit("a red circle"), state="done")
    for path in tried.folder.iterdir():
        path.unlink()
    reply = tried.client.get(job["video"])
    assert reply.status_code == 404
    assert reply.get_json()["error"].endswith("was removed; submit the same again")


def test_closing_stops_the_worker_at_its_next_step(tried: Demo) -> None:
    job_id = tried.submit("one")
    tried.miniature.allow(1)
    tried.until(job_id, step=1)
    threading.Timer(0.05, tried.miniature.allow).start()
    tried.queue.close()
    assert tried.miniature.steps_of == {"one": 2}


def test_the_oldest_ended_jobs_are_forgotten_with_their_clips(
    tried: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils.web.jobs, "KEPT", 2)
    tried.miniature.allow()
    jobs = [tried.submit(prompt) for prompt in ("one", "two", "three")]
    tried.until(jobs[-1], state="done")
    assert tried.client.get(f"/api/jobs/{jobs[0]}").status_code == 404
    assert {path.stem for path in tried.folder.iterdir()} == set(jobs[1:])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (None, "application/json"),
        ([], "application/json"),
        ("a red circle", "application/json"),
        ({}, "prompt: is missing; it says what the clip shows"),
        ({"prompt": "a", "seed": 0, "sede": 1}, "unknown field 'sede' (did you mean 'seed'?)"),
        ({"prompt": "a", "steps": 8}, "steps: this model makes clips in the 4 steps of its traini"),
        ({"prompt": " \n", "seed": 0}, "prompt: must be a text that is not empty"),
        ({"prompt": 5, "seed": 0}, "prompt: must be a text"),
        ({"prompt": "a" * 2001, "seed": 0}, "prompt: at most 2000 characters, this one has 2001"),
        ({"prompt": "a", "seed": -1}, "got -1"),
        ({"prompt": "a", "seed": 2**53}, "got 9007199254740992"),
        ({"prompt": "a", "seed": 1.0}, "got 1.0"),
        ({"prompt": "a", "seed": True}, "got True"),
        ({"prompt": "a", "seed": "7"}, "got '7'"),
        ({"prompt": "a", "frames": 10**5 + 3}, "the nearest is 100001"),
        ({"prompt": "a", "size": [30, 32]}, "the nearest is 32x32"),
        ({"prompt": "a\ud800"}, "prompt: has half a character at 1"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(tried: Demo, body: object, reason: str) -> None:
    reply = tried.client.post("/api/jobs", json=body)
    assert reply.status_code == 400
    assert reason in reply.get_json()["error"]


def test_all_that_is_wrong_is_told_at_once(tried: Demo) -> None:
    body = {"prompt": "", "seed": -1, "frames": 2, "cfg_scale": 3, "sample": "x"}
    reply = tried.client.post("/api/jobs", json=body)
    problems = reply.get_json()["problems"]
    assert [line.partition(":")[0] for line in problems] == [
        "prompt", "seed", "sample", "frames", "cfg_scale",
    ]  # fmt: skip
    assert reply.get_json()["error"] == "\n".join(problems)


def test_nested_brackets_without_end_are_refused_as_any_other_body(tried: Demo) -> None:
    body = '{"prompt": ' + "[" * 30000 + "]" * 30000 + "}"
    reply = tried.client.post("/api/jobs", data=body, content_type="application/json")
    assert reply.status_code == 400


def test_a_prompt_alone_is_enough_and_its_seed_is_0(tried: Demo) -> None:
    reply = tried.client.post("/api/jobs", json={"prompt": "a red circle"})
    assert reply.status_code == 202
    assert (reply.get_json()["prompt"], reply.get_json()["seed"]) == ("a red circle", 0)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
def test_what_a_foreign_page_could_send_is_refused(tried: Demo, content_type: str) -> None:
    body = '{"prompt": "a", "seed": 0}'
    reply = tried.client.post("/api/jobs", data=body, content_type=content_type)
    assert reply.status_code == 400
    assert "Access-Control-Allow-Origin" not in reply.headers


def test_every_error_is_json_with_its_status(tried: Demo) -> None:
    running = tried.submit("one")
    cancelled = tried.submit("two")
    call = tried.client.open
    call(f"/api/jobs/{cancelled}", method="DELETE")
    replies = {
        404: [call("/api/jobs/none"), call("/api/jobs/none", method="DELETE"), call("/nothing")],
        405: [call("/api/jobs", method="PUT")],
        409: [call(f"/api/jobs/{running}/video"), call(f"/api/jobs/{cancelled}", method="DELETE")],
        413: [call("/api/jobs", method="POST", json={"prompt": "a" * 2**17, "seed": 0})],
    }
    for status, answers in replies.items():
        for answer in answers:
            assert (answer.status_code, list(answer.get_json())) == (status, ["error"])
    assert "POST" in replies[405][0].headers["Allow"]


def test_a_full_queue_refuses_more(tried: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils.web.jobs, "MAX_QUEUED", 2)
    tried.until(tried.submit("running"), state="running")
    tried.submit("one")
    tried.submit("two")
    reply = tried.client.post("/api/jobs", json={"prompt": "three", "seed": 0})
    assert reply.status_code == 429
    assert reply.json == {"error": "the queue is full (2 jobs); try again later"}


def test_the_page_fetches_nothing_from_outside(tried: Demo) -> None:
    page = tried.client.get("/").text
    names = re.findall(r'(?:href|src)="(static/[^"]+)"', page)
    own = [path.name for path in PAGE.glob("*.*") if path.stem not in ("index", "report")]
    assert {Path(name).name for name in names} == set(own)
    for name in names:
        text = tried.client.get(f"/{name}").text
        assert not re.search(r"(?<!xmlns=\")https?://|url\(|@import", text), name


def test_equal_requests_to_a_real_model_give_equal_files(tiny_root: Path, tmp_path: Path) -> None:
    config = load(CONFIG, [f"model_root={tiny_root / 'wan_models'}"])
    folder = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny"
    model = load_generator(check_source(config, folder, use_ema=False), torch.device("cpu"))
    with closing(JobQueue(partial(make_clip, model, 8.0), tmp_path)) as queue:
        client = create_app(queue, ABOUT, model.capabilities).test_client()
        tried = Demo(Miniature(), queue, client, tmp_path)
        jobs = [tried.submit("a red circle", seed) for seed in (1, 2, 1)]
        done = [tried.until(job, state="done") for job in jobs]
    first, other, again = ((tmp_path / f"{job}.mp4").read_bytes() for job in jobs)
    assert [job["steps"] for job in done] == [4, 4, 4]
    assert first == again
    assert first != other


def test_a_many_step_model_takes_what_a_request_asks_for(tiny_root: Path, tmp_path: Path) -> None:
    config = load(ROOT / "configs" / "tiny" / "diffusion.yaml", [
        f"model_root={tiny_root / 'wan_models'}", "sampling.steps=2",
    ])  # fmt: skip
    folder = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny"
    model = load_generator(check_source(config, folder, use_ema=False), torch.device("cpu"))
    wanted = {
        "prompt": "a red circle", "negative_prompt": "a green bar", "size": [48, 32], "frames": 9,
        "steps": 3, "cfg_scale": 4.0,
    }  # fmt: skip
    with closing(JobQueue(partial(make_clip, model, 8.0), tmp_path)) as queue:
        client = create_app(queue, ABOUT, model.capabilities).test_client()
        tried = Demo(Miniature(), queue, client, tmp_path)
        job_id = client.post("/api/jobs", json=wanted).get_json()["id"]
        done = tried.until(job_id, state="done")
    assert done["request"] == {**wanted, "seed": 0, "sample": 0}
    assert done["steps"] == 3
    assert iio.imread(tmp_path / f"{job_id}.mp4").shape == (9, 384, 256, 3)


def test_the_page_names_the_adapters_that_are_on(tiny_root: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.safetensors"
    write_adapter(few, random_factors(["blocks.0.ffn.0"], MINIATURE))
    config = load(CONFIG, [f"model_root={tiny_root / 'wan_models'}"])
    folder = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny"
    source = check_source(config, folder, use_ema=False, adapters=[f"{few}:0.5"])
    about = describe(config, source, load_generator(source, torch.device("cpu")))
    assert about.adapters == ["few.safetensors:0.5"]


def arguments(tiny_root: Path, *more: str) -> list[str]:
    """A command line for the miniature model folder."""
    models = tiny_root / "wan_models"
    return [
        "--config_path", str(CONFIG), "--checkpoint_path", str(models / "Wan2.1-T2V-Tiny"),
        "--port", "0", *more, f"model_root={models}",
    ]  # fmt: skip


def test_startup_errors_are_one_line_and_come_before_the_weights(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "load_generator", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        wrong = {
            "denoising_steps": ["denoising_steps=3"],
            "no/such/weights": ["--checkpoint_path", "no/such/weights"],
            "no/such.yaml": ["--config_path", "no/such.yaml"],
            f"--port {port}": ["--port", port],
            "--port 70000": ["--port", "70000"],
            "--fps": ["--fps", "0"],
            "inference.py --i2v": [
                "generator.model=Wan2.1-I2V-Tiny",
                "--checkpoint_path", str(tiny_root / "wan_models" / "Wan2.1-I2V-Tiny"),
            ],
        }  # fmt: skip
        for named, more in wrong.items():
            assert demo.main(arguments(tiny_root, *more)) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ")
            assert error.count("\n") == 1
            assert named in error


def served_until(stop: int, words: list[str], folder: Path) -> tuple[int, str]:
    """On a process of its own: status and stderr of a demo that is stopped once it serves."""
    tempfile.tempdir = str(folder)
    served = threading.Event()
    make = demo.make_server

    def made(*args: Any, **kwargs: Any) -> Any:
        server = make(*args, **kwargs)
        serve = server.serve_forever
        server.serve_forever = lambda: (served.set(), serve())[1]
        return server

    def send() -> None:
        served.wait(60.0)
        time.sleep(0.2)
        os.kill(os.getpid(), stop)

    threading.Thread(target=send, daemon=True).start()
    with patch.object(demo, "make_server", made):
        return main_and_stderr(demo.main, words)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demo_without_a_word_and_leaves_no_folder(
    tiny_root: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    ((status, errors),) = run_on_ranks(1, served_until, stop, arguments(tiny_root), tmp_path)
    assert status in (0, 130)
    assert errors == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_without_a_traceback(
    tiny_root: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    command = [sys.executable, str(ROOT / "demo.py"), *arguments(tiny_root)]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert re.match(r"Fewstep demo: http://127\.0\.0\.1:\d+ ", process.stdout.readline())
            assert len(list(tmp_path.glob("*-demo"))) == 1
            process.send_signal(stop)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode in (0, 130)
    assert errors == ""
    assert list(tmp_path.glob("*-demo")) == []


SIZED = re.compile(r"seed 3 \S+ 4 steps \S+ \d+\.\d s \S+ 256(\xa0|&nbsp;)\S+(\xa0|&nbsp;)256")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no `chromium` on the PATH to show the page in")
def test_a_link_with_go_makes_its_clip_in_a_browser(tried: Demo, tmp_path: Path) -> None:
    tried.miniature.allow()
    server = make_server("127.0.0.1", 0, create_app(tried.queue, ABOUT, STUDENT), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        link = f"http://127.0.0.1:{server.port}/?prompt=a+red+circle&seed=3&go=1"
        for attempt in range(4):  # the page's own time may run out before a busy machine decodes
            dom = read_page(link, tmp_path / f"profile{attempt}")
            if SIZED.search(dom):
                break
    finally:
        server.shutdown()
        thread.join()
    assert 'data-state="done"' in dom
    assert re.search(r'<video id="video"[^>]* src="api/jobs/\w+/video"', dom)
    # The page learns the size from the video itself: the browser could decode it.
    assert SIZED.search(dom)
    assert 'title="a green bar"' in dom


def read_page(link: str, profile: Path) -> str:
    """The document after a minute of the page's own time, which does not wait for the clock."""
    quiet = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --virtual-time-budget=60000"
    )
    command = [str(BROWSER), *quiet.split(), f"--user-data-dir={profile}", "--dump-dom", link]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return result.stdout
