"""What speed.py does with tasks: times them in turn, compares packages, and gathers it all."""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import speed_processes as processes
import speed_tasks
import torch
from speed_tasks import TASKS, Call, Package, Setting
from torch import Tensor
from tqdm import tqdm

from guided_diffusion import checkpoints

OTHERS = ("memory", "data", "startup")  # what is measured besides TASKS
PRODUCT = "product"
ENOUGH = 0.05  # seconds: what is faster is called several times on one clock
FEW_ROUNDS = 3  # at most, of what takes seconds each time: start-up

Tick = Callable[[], Any]  # moves the bar
Clock = Callable[[int], float]  # number of the round -> seconds
Record = dict[str, Any]  # what was measured of one package


class Benchmark:
    """All that one command measures.

    Args:
        args: has device, precision, rounds, photo, crop and json, see speed.py.
        tasks: out of TASKS and OTHERS.
        packages: the first is what the others are compared with.
        settings: configurations by name.

    Attributes:
        results: what was found so far, ready for JSON and for `speed_tables.tables`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        tasks: list[str],
        packages: list[Package],
        settings: dict[str, Setting],
    ):
        self.args, self.tasks, self.packages, self.settings = args, tasks, packages, settings
        self.results: Record = {
            "machine": describe_machine(args),
            "packages": [package.label for package in packages],
            "configs": {
                name: {"flags": setting.flags, "batch_size": setting.batch, "tasks": {}}
                | {"training_memory": {}}
                for name, setting in settings.items()
            },
            "data": {},
            "start_up": {},
            "failed": [],
        }

    def run(self) -> None:
        """Measure everything, with a bar and the time left; after each part, write the JSON."""
        jobs, done = list(self._jobs()), 0
        with tqdm(total=sum(units for units, _ in jobs), unit="run", smoothing=0) as bar:
            for units, job in jobs:
                job(bar.update)
                done += units
                bar.update(done - bar.n)  # what failed takes no time
                if self.args.json:
                    content = f"{json.dumps(self.results, indent=1)}\n"
                    checkpoints.write_bytes(str(self.args.json), content.encode())

    def _jobs(self) -> Iterator[tuple[int, Callable[[Tick], None]]]:
        """Yield each job after its number of steps on the bar."""
        num, rounds = len(self.packages), self.args.rounds
        timed = [task for task in self.tasks if task in TASKS]
        for name in self.settings:
            for task in timed:
                yield rounds * (num + 1), partial(self._time, name, task)
            if "memory" in self.tasks:
                modes = (1 + num) * ("train" in timed)
                yield len(timed) * num + modes, partial(self._weigh, name, timed)
        if "data" in self.tasks:
            yield rounds * num, self._time_loading
        if "startup" in self.tasks:
            yield self._few() * num, self._time_help
            for name in self.settings:
                yield self._few() * num, partial(self._time_first_step, name)

    def _few(self) -> int:
        return min(self.args.rounds, FEW_ROUNDS)

    def _try(self, package: Package, what: str, action: Callable[[], Any]) -> Any:
        """Return the result of `action`; if it fails, None, and note why."""
        try:
            return action()
        except Exception as error:
            reason = processes.last_line(f"{type(error).__name__}: {error}")
            self.results["failed"].append(f"{package.label}: {what}: {reason}")
            return None

    def _compare(self, clocks: dict[str, Clock], rounds: int, tick: Tick) -> dict[str, Record]:
        """Return the record of each package, as timed by its clock."""
        return compare(interleave(clocks, rounds, tick), self.packages[0].label)

    # -- the networks --------------------------------------------------------------------------

    def _time(self, name: str, task: str, tick: Tick) -> None:
        """Time a task of a configuration with all packages, and the matrix product, in turn."""
        setting, device = self.settings[name], self.args.device
        prepared = {}
        with speed_tasks.session(task, setting):
            for package in self.packages:
                start = partial(prepare, task, package, setting)
                found = self._try(package, f"{name}: {task}", start)
                if found:
                    prepared[package.label] = found
            calls = {label: call for label, (call, _, _) in prepared.items()}
            calls |= {PRODUCT: speed_tasks.product(device)} if calls else {}
            clocks = {label: clock(call, device) for label, call in calls.items()}
            seconds = interleave(clocks, self.args.rounds, tick)
        rate = 2 * speed_tasks.SIDE**3 / np.array(seconds.pop(PRODUCT, [1.0]))  # by rounds
        records = compare(seconds, self.packages[0].label)
        needed = min((flops for _, _, flops in prepared.values()), default=0)
        for label, record in records.items():
            flops = prepared[label][2]
            record |= {
                "images_per_s": setting.batch / record["seconds"],
                "gflops": flops / 1e9,
                "gflops_per_image": flops / 1e9 / setting.batch,
                "product_share": float(np.median(needed / np.array(seconds[label]) / rate)),
                "product_gflops_per_s": float(np.median(rate)) / 1e9,
            }
        add_differences(records, {label: found[1] for label, found in prepared.items()})
        self.results["configs"][name]["tasks"][task] = records

    def _weigh(self, name: str, tasks: list[str], tick: Tick) -> None:
        """Find the peak of memory of each task, and of the modes of a training step."""
        setting, found = self.settings[name], self.results["configs"][name]
        for task in tasks:
            for package in self.packages:
                size = self._peak(package, name, task, setting, tick)
                if size is not None:
                    found["tasks"][task].setdefault(package.label, {})["peak_bytes"] = size
        if "train" not in tasks:
            return
        sizes = {
            label: record.get("peak_bytes") for label, record in found["tasks"]["train"].items()
        }
        modes = found["training_memory"] = {"as given": sizes}
        for mode, changed in processes.training_modes(setting).items():
            modes[mode] = {
                package.label: self._peak(package, f"{name}, {mode}", "train", changed, tick)
                for package in self.packages[: 1 if changed.as_published else None]
            }

    def _peak(
        self, package: Package, name: str, task: str, setting: Setting, tick: Tick
    ) -> int | None:
        weigh = partial(processes.peak, package, task, setting, torch.get_num_threads())
        size = self._try(package, f"{name}: memory of {task}", weigh)
        tick()
        return size

    # -- around them ---------------------------------------------------------------------------

    def _time_loading(self, tick: Tick) -> None:
        """Time the loaders, and compare what they load."""
        crop, (width, height) = self.args.crop, self.args.photo
        clocks, outputs = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            photos = Path(folder) / "photos"
            size = processes.write_photographs(photos, processes.NUM_PHOTOS, (width, height))
            for package in self.packages:
                first = partial(processes.first_batch, package, photos, crop)
                images = self._try(package, "data", first)
                if images is not None:
                    outputs[package.label] = [images]
                    load = partial(processes.loading_seconds, package, photos, crop)
                    clocks[package.label] = lambda _, load=load: load()
            records = self._compare(clocks, self.args.rounds, tick)
        num = processes.LOAD_BATCH * processes.BATCHES
        for record in records.values():
            record["images_per_s"] = num / record["seconds"]
        add_differences(records, outputs)
        photo = {"photo": f"{width} x {height}", "crop": crop, "bytes_per_photo": size}
        self.results["data"] = photo | {"packages": records}

    def _time_help(self, tick: Tick) -> None:
        self._time_starts("--help", processes.help_seconds, tick)

    def _time_first_step(self, name: str, tick: Tick) -> None:
        """Time the training script of each package until its first step is done."""
        setting = self.settings[name]
        flags = {n: v for n, v in setting.flags.items() if not n.startswith("classifier_")}
        flags |= {"batch_size": setting.batch, "use_fp16": setting.precision == "float16"}
        with tempfile.TemporaryDirectory() as folder:
            flags["data_dir"] = Path(folder) / "images"
            size = setting.flags["image_size"]
            processes.write_photographs(flags["data_dir"], setting.batch, (size, size))

            def measure(package: Package, env: dict[str, str]) -> float:
                log = Path(tempfile.mkdtemp(dir=folder))
                return processes.first_step_seconds(package, env, flags, log)

            self._time_starts(f"first training step, {name}", measure, tick)

    def _time_starts(self, what: str, measure: Callable[..., float], tick: Tick) -> None:
        """Start the script of each package in turn, after a first start that does not count."""
        clocks = {}
        for package in filter(processes.script_of, self.packages):
            env = processes.environment(package, self.args.device, torch.get_num_threads())
            start = partial(measure, package, env)
            if self._try(package, what, start):
                clocks[package.label] = lambda _, start=start: start()
        self.results["start_up"][what] = self._compare(clocks, self._few(), tick)


# --------------------------------------------------------------------------------------------
# Timing


def prepare(task: str, package: Package, setting: Setting) -> tuple[Call, list[Tensor], int]:
    """Return a task's call, what its first two calls return, and its FLOPs."""
    call = TASKS[task](package, setting)
    outputs = []
    for i in range(2):
        torch.manual_seed(i)
        outputs.append(call(i).float().cpu())
    return call, outputs, speed_tasks.count_flops(call)


def clock(call: Call, device: str) -> Clock:
    """Return what times a call, or the mean of as many in a row as take ENOUGH."""

    def seconds_of(first: int, num: int) -> float:
        torch.manual_seed(first)
        synchronize(device)
        start = time.perf_counter()
        for i in range(first, first + num):
            call(i)
        synchronize(device)
        return (time.perf_counter() - start) / num

    num = max(1, round(ENOUGH / seconds_of(0, 1)))
    return lambda i: seconds_of(i * num, num)


def synchronize(device: str) -> None:
    """Wait for a GPU to finish."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(clocks: dict[str, Clock], rounds: int, tick: Tick) -> dict[str, list[float]]:
    """Return the seconds of each clock in each round; every other round goes backwards."""
    seconds = {name: [] for name in clocks}
    for i in range(rounds):
        for name in list(clocks)[:: -1 if i % 2 else 1]:
            seconds[name].append(clocks[name](i))
            tick()
    return seconds


def compare(seconds: dict[str, list[float]], base: str) -> dict[str, Record]:
    """Return medians and, but for `base`, the quartiles of ratios to it, round by round."""
    records = {}
    for label, values in seconds.items():
        records[label] = {"seconds": float(np.median(values)), "rounds": values}
        if label != base and base in seconds:
            ratios = np.array(values) / np.array(seconds[base])
            records[label]["ratio"] = np.percentile(ratios, [25, 50, 75]).tolist()
    return records


def add_differences(records: dict[str, Record], outputs: dict[str, list[Tensor]]) -> None:
    """Note how far each package's outputs are from the first one's, by the largest of those."""
    first, *others = outputs or [None]
    for label in others:
        records[label]["difference"] = max(
            float((ours - theirs).abs().max() / ours.abs().max())
            for ours, theirs in zip(outputs[first], outputs[label], strict=True)
        )


# --------------------------------------------------------------------------------------------
# Where


def describe_machine(args: argparse.Namespace) -> Record:
    """Return what figures depend on."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    return {
        "device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "precision": args.precision, "rounds": args.rounds,
    }  # fmt: skip


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
