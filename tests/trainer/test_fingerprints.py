"""Whatever changes between two starts of a run is noticed: each thing alone, and any two."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import lmdb
import pytest
import torch

from scripts.make_tiny_world import NAME
from tests.conftest import build_wan
from tests.runs import write_config
from trainer.config import load
from trainer.fingerprint import Fingerprint, fingerprint
from trainer.inputs import check_inputs
from trainer.run import resolve
from utils.data.shards import ShardReader, ShardWriter
from utils.distributed import Session
from utils.weights import write_weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
ROLES = ("generator", "critic", "teacher")
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def begun(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of eight records, and a model folder for each role."""
    room = tmp_path_factory.mktemp("begun")
    for seed, role in enumerate(ROLES):
        folder = room / "wan_models" / role
        shutil.copytree(tiny_root / "wan_models" / NAME, folder)
        write_weights(build_wan(seed=seed).state_dict(), folder / WEIGHTS, {})
    source = ShardReader(tiny_root / "data" / "tiny" / "latents")
    for number, name in enumerate(("a", "b")):
        add(room, name, source, range(8 * number, 8 * number + 8))
    return room


@pytest.fixture
def room(begun: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(begun, tmp_path / "room"))


def add(room: Path, name: str, source: ShardReader, records: range) -> None:
    with ShardWriter(room / "data" / name) as writer:
        writer.append(
            [source.prompt(i) for i in records],
            latents=torch.stack([source.latents(i) for i in records]),
            images=torch.stack([source.image(i) for i in records]),
        )


def print_of(room: Path) -> Fingerprint:
    words = [f"{role}.model={role}" for role in ROLES]
    config = load(write_config(room, room, "dmd_gan"), [*words, f"data.path={room / 'data'}"])
    run = resolve(config)
    return fingerprint(run, check_inputs(run, Session(0, 1, torch.device("cpu"))))


# ---- changes


def lose_a_shard(room: Path) -> None:
    shutil.rmtree(room / "data" / "b")


def grow(room: Path) -> None:
    source = ShardReader(room / "data" / "a")
    add(room, "c", source, range(4))


def put(room: Path, records: dict[str, bytes]) -> None:
    path = str(room / "data" / "a")
    with lmdb.open(path, map_size=2**28, lock=False) as env, env.begin(write=True) as change:
        for key, value in records.items():
            change.put(key.encode(), value)


def get(room: Path, key: str) -> bytes:
    with lmdb.open(str(room / "data" / "a"), readonly=True, lock=False) as env, env.begin() as rows:
        return bytes(rows.get(key.encode()))


def reorder(room: Path) -> None:
    names = [f"{kind}_{row}_data" for kind in ("prompts", "latents", "img") for row in (1, 5)]
    values = [get(room, name) for name in names]
    put(room, dict(zip(names, [values[i ^ 1] for i in range(6)], strict=True)))


def change_a_caption(room: Path) -> None:
    put(room, {"prompts_2_data": b"another"})


def change_latents(room: Path) -> None:
    values = get(room, "latents_3_data")
    put(room, {"latents_3_data": values[:-1] + bytes([values[-1] ^ 1])})


def change_an_image(room: Path) -> None:
    values = get(room, "img_4_data")
    put(room, {"img_4_data": bytes([values[0] ^ 1]) + values[1:]})


def change_weights(role: str) -> Change:
    def change(room: Path) -> None:
        path = room / "wan_models" / role / WEIGHTS
        write_weights(build_wan(seed=7).state_dict(), path, {})

    return change


def exchange_weights(room: Path) -> None:
    one, other = (room / "wan_models" / role / WEIGHTS for role in ("generator", "critic"))
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


CAPTIONS = "data.path: captions were changed, or records reordered"
TENSORS = "data.path: latents, images or trajectories were changed"


def weights_of(*roles: str) -> list[str]:
    return [f"{role}: the weights that it begins with were exchanged" for role in sorted(roles)]


# Each change, by how much the number of records moves, and what is told of it alone.
CHANGES: dict[str, tuple[Change, int, list[str]]] = {
    "shard lost": (lose_a_shard, -8, ["data.path: has shrunk from 16 to 8 records"]),
    "grown": (grow, 4, ["data.path: has grown from 16 to 20 records"]),
    "reordered": (reorder, 0, [CAPTIONS]),
    "caption": (change_a_caption, 0, [CAPTIONS]),
    "latents": (change_latents, 0, [TENSORS]),
    "image": (change_an_image, 0, [TENSORS]),
    **{role: (change_weights(role), 0, weights_of(role)) for role in ROLES},
    "exchanged": (exchange_weights, 0, weights_of("generator", "critic")),
}


def expected(names: tuple[str, ...]) -> list[str]:
    """What is told of some changes: of the data the coarsest, of weights each."""
    moved = sum(CHANGES[name][1] for name in names)
    told = [line for name in names for line in CHANGES[name][2]]
    data = [line for line in told if line.startswith("data.path")]
    if moved:
        word = "grown" if moved > 0 else "shrunk"
        data = [f"data.path: has {word} from 16 to {16 + moved} records"]
    elif CAPTIONS in data:
        data = [CAPTIONS]
    return data[:1] + sorted({line for line in told if not line.startswith("data.path")})


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_noticed(name: str, begun: Path, room: Path) -> None:
    before = print_of(begun)
    assert print_of(room) == before
    CHANGES[name][0](room)
    assert list(print_of(room).differences(before)) == CHANGES[name][2]


@pytest.mark.slow
def test_any_two_changes_are_noticed(begun: Path, tmp_path: Path) -> None:
    before = print_of(begun)
    for number, names in enumerate(combinations(CHANGES, 2)):
        room = Path(shutil.copytree(begun, tmp_path / str(number)))
        for name in names:
            CHANGES[name][0](room)
        assert list(print_of(room).differences(before)) == expected(names), names
        shutil.rmtree(room)


def test_a_shard_lost_and_as_many_records_added_are_noticed(begun: Path, room: Path) -> None:
    lose_a_shard(room)
    source = ShardReader(begun / "data" / "a")
    add(room, "c", source, range(8))
    assert list(print_of(room).differences(print_of(begun))) == [CAPTIONS]


def test_shards_that_were_renamed_alone_are_records_reordered(begun: Path, room: Path) -> None:
    (room / "data" / "a").rename(room / "data" / "z")
    assert list(print_of(room).differences(print_of(begun))) == [CAPTIONS]
