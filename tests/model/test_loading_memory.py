"""How much host memory a rank needs to load its part of a large model."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model.families.wan21.folder import CONFIG, WEIGHTS
from model.families.wan21.weights import find_weights, load_network
from model.folders.loading import Placement
from model.wan.config import WanConfig, diffusers_config, write_wan_config
from model.wan.transformer import WanTransformer
from model.wan.weights import to_diffusers
from tests.ranks import run_on_ranks
from utils.distributed import distributed_session
from utils.parallel import build_mesh

WORLD, SHARDS, MB = 2, 4, 2**20
# Ten layers, in the slow tier ten of the thirty of the 1.3B model: 0.4 and 2 GB of fp32.
SIZES = {
    "small": WanConfig(dim=768, ffn_dim=4096, num_heads=6, num_layers=10),
    "large": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=10),
}
every_size = pytest.mark.parametrize(
    "config",
    [
        pytest.param(v, id=k, marks=pytest.mark.slow if k == "large" else ())
        for k, v in SIZES.items()
    ],
)


@dataclass(frozen=True)
class Loaded:
    """What loading took on one rank, in bytes and seconds."""

    own: int  # of the weights that this rank keeps
    peak: int  # growth of resident memory at its highest, mapped pages of files included
    seconds: float
    right: bool  # whether every row that it keeps has its value


def value_of(name: str, shape: torch.Size, start: int = 0) -> Tensor:
    """Rows of a weight from `start` on: each row of each weight is another number."""
    rows = torch.arange(start, start + shape[0], dtype=torch.float32) + len(name)
    return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def names_and_shapes(config: WanConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {k: v.shape for k, v in WanTransformer(config).state_dict().items()}


def write_shards(folder: Path, config: WanConfig, renamed: Callable[[str], str]) -> int:
    """Write weights as shards with their index; returns the bytes of the largest."""
    folder.mkdir(parents=True)
    groups: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    shapes = names_and_shapes(config)
    filled, share = 0, sum(shape.numel() for shape in shapes.values()) / SHARDS
    for name, shape in shapes.items():
        groups[min(SHARDS - 1, int(filled // share))][name] = value_of(name, shape)
        filled += shape.numel()
    weight_map, largest = {}, 0
    for i, group in enumerate(groups):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file({renamed(name): v.contiguous() for name, v in group.items()}, folder / file)
        weight_map |= {renamed(name): file for name in group}
        largest = max(largest, (folder / file).stat().st_size)
    (folder / WEIGHTS[0]).write_text(json.dumps({"weight_map": weight_map}))
    return largest


def resident(field: str) -> int:
    """A line of this process's memory status, in bytes: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"/proc/self/status has no {field}")


def load(path: Path, config: WanConfig) -> Loaded:
    """Load the model at `path`, sharded; runs on a rank."""
    with distributed_session() as session:
        place = Placement(session.device, mesh=build_mesh(session, "full"))
        weights = find_weights(path)
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
        before, start = resident("VmRSS"), time.monotonic()
        network = load_network(config, weights, place, what="a test")
        peak, seconds = resident("VmHWM") - before, time.monotonic() - start
        own, right = 0, True
        for name, weight in network.model.state_dict().items():
            assert isinstance(weight, DTensor)
            local = weight.to_local()
            shape, offset = compute_local_shape_and_global_offset(
                weight.shape, weight.device_mesh, weight.placements
            )
            own += local.nbytes
            right &= torch.equal(local, value_of(name, torch.Size(shape), offset[0]))
        return Loaded(own, peak, seconds, right)


def report(kind: str, results: list[Loaded], largest: int) -> None:
    for rank, result in enumerate(results):
        print(
            f"{kind}, rank {rank}: keeps {result.own / MB:.0f} MB, grew by {result.peak / MB:.0f} "
            f"MB at most, in {result.seconds:.1f} s; largest file {largest / MB:.0f} MB"
        )
        assert result.right


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes, which are not kept."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def official(root: Path, config: WanConfig) -> tuple[Path, int]:
    largest = write_shards(root / "Wan2.1", config, lambda name: name)
    write_wan_config(config, root / "Wan2.1" / CONFIG)
    return root / "Wan2.1", largest


def diffusers(root: Path, config: WanConfig) -> tuple[Path, int]:
    folder = root / "Wan2.1-Diffusers" / "transformer"
    largest = write_shards(folder, config, to_diffusers)
    (folder / CONFIG).write_text(json.dumps(diffusers_config(config)))
    return root / "Wan2.1-Diffusers", largest


@every_size
@pytest.mark.parametrize("write", [official, diffusers])
def test_a_rank_never_holds_much_more_than_its_part_and_a_shard(
    room: Path, write: Callable[[Path, WanConfig], tuple[Path, int]], config: WanConfig
) -> None:
    path, largest = write(room, config)
    results = run_on_ranks(WORLD, load, path, config)
    report(write.__name__, results, largest)
    assert sum(result.own for result in results) > 3.5 * largest
    assert all(result.peak < result.own + 1.3 * largest for result in results)


@every_size
def test_a_pt_file_is_mapped_so_that_a_rank_sees_only_its_rows(
    room: Path, config: WanConfig
) -> None:
    shapes = names_and_shapes(config)
    state = {f"model.{n}": value_of(n, s).contiguous() for n, s in shapes.items()}
    path = room / "model.pt"
    torch.save({"generator": state}, path)
    del state
    size = path.stat().st_size
    results = run_on_ranks(WORLD, load, path, config)
    report(".pt", results, size)
    # The rows that a rank read stay in the page cache, and count once more as long as it is open.
    # Whatever the size, some 60 MB are torch's own.
    assert all(result.peak < 2.0 * result.own + 0.1 * size + 64 * MB for result in results)
