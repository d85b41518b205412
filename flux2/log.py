"""What a run says while it runs: metrics.jsonl, progress, image grids, tables, curves, W&B.

metrics.jsonl has one JSON object a step, keys sorted, null where a number was not finite. A run
that is resumed at step k drops the lines of steps ≥ k first, so that the file reads as if it had
never stopped. Every rank notes its numbers; rank 0 writes the means over all of them, and speaks.
wandb, PIL and matplotlib are imported where they are used.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from flux2 import distributed
from flux2.errors import InputError
from flux2.files import jsonable, read_json, write_text

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

T = TypeVar("T")

PAUSE = 30.0  # seconds between the lines of `progress`
TILE = 192  # pixels: images are enlarged by whole factors of at most 3 towards this width
LINES = 4  # of caption under an image
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito


class Log:
    """The log of one run.

        with Log(run_dir, cfg.logger, total_steps, start) as log:
            for step in range(start, total_steps):
                log.log(step, {"loss": loss})
                log.flush(step)

    Args:
        run_dir: holds metrics.jsonl and samples/; its manifest.json, if there, names the W&B run.
        cfg: the `logger` group.
        total_steps: for progress and the time left.
        start: the step that comes first; more than 0 after a resume.

    Raises:
        InputError: an unknown W&B mode, or W&B cannot be reached.
    """

    def __init__(
        self, run_dir: str | Path, cfg: DictConfig, total_steps: int, start: int = 0
    ) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / "metrics.jsonl"
        self._cfg = cfg
        self._total, self._start, self._done = total_steps, start, start
        self._began = self._spoke = time.monotonic()
        self._pending: dict[int, dict[str, list[Any]]] = {}
        self.main = distributed.is_main()
        self._wandb = start_wandb(self.run_dir, cfg) if self.main else None
        if self.main:
            _truncate(self.path, start)
        path = self.path if self.main else os.devnull
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._bar = (
            tqdm(total=total_steps, initial=start, dynamic_ncols=True, file=sys.stderr)
            if self.main and sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def log(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Note scalars for `step`. A name that comes again in a step, or on another rank, is
        averaged.

        Tensors stay where they are until flush, so that this never waits for an accelerator.
        """
        row = self._pending.setdefault(step, {})
        for name, value in metrics.items():
            detach = getattr(value, "detach", None)
            row.setdefault(name, []).append(detach() if detach is not None else value)

    def flush(self, step: int) -> dict[str, float | None]:
        """Write the line of `step`, advance the progress, send to W&B; returns what was written.
        All ranks call it together."""
        mine = {k: [float(v) for v in row] for k, row in self._pending.pop(step, {}).items()}
        noted: dict[str, list[float]] = {}
        for part in distributed.gather_objects(mine):
            for name, values in part.items():
                noted.setdefault(name, []).extend(values)
        means = {name: sum(v) / len(v) for name, v in noted.items()}
        row: dict[str, float | None] = jsonable(means)
        if not self.main:
            return row
        self._file.write(json.dumps({**row, "step": step}, sort_keys=True, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb is not None and step >= self._wandb.step:  # it refuses to go back
            self._wandb.log({k: v for k, v in row.items() if v is not None}, step=step)
        self._progress(step, row)
        return row

    def print(self, text: str) -> None:
        """A line on stdout that does not tear the progress bar."""
        if not self.main:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def image(
        self,
        name: str,
        images: Tensor,
        captions: Sequence[str] | None = None,
        columns: int | None = None,
    ) -> Path:
        """Write samples/<name>.png, a captioned grid.

        Args:
            name: of the file, without its ending.
            images: b 3 h w uint8.
            captions: b strings, drawn below the images.
            columns: of the grid; default near-square.
        """
        path = self.run_dir / "samples" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = grid(images, captions, columns)
        picture.save(path)
        if self._wandb is not None:
            import wandb

            step = max(self._done - 1, self._wandb.step)
            self._wandb.log({f"samples/{name}": wandb.Image(picture)}, step=step)
        return path

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
        """Print a table in columns of fixed width; returns the text (see `table`)."""
        text = table(header, rows)
        self.print(text)
        return text

    def curve(
        self,
        path: str | Path,
        series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        ylabel: str = "",
    ) -> Path:
        """Plot named (steps, values) to a PNG; a relative path lies in the run directory."""
        return curve(self.run_dir / path, series, ylabel)

    def history(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric so far, those before a resume included; nulls left out."""
        self._file.flush()
        rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        kept = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
        return [s for s, _ in kept], [v for _, v in kept]

    def close(self, failed: bool = False) -> None:
        """Close the file, the bar and the W&B run. May be called twice."""
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
            self._wandb = None

    def _progress(self, step: int, row: Mapping[str, float | None]) -> None:
        self._done = step + 1
        names = list(self._cfg.show) or list(row)[:3]
        shown = {n: "nan" if row[n] is None else f"{row[n]:.4g}" for n in names if n in row}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(self._done - self._bar.n)
            return
        now = time.monotonic()
        first, last = self._done == self._start + 1, self._done == self._total
        if not (first or last or now - self._spoke >= self._cfg.interval):
            return
        self._spoke = now
        pace = (now - self._began) / (self._done - self._start)
        left = tqdm.format_interval(max(self._total - self._done, 0) * pace)
        parts = [f"step {self._done}/{self._total}", f"{pace:.3g} s/step", f"left {left}"]
        parts += [f"{n} {v}" for n, v in shown.items()]
        print(" · ".join(parts), file=sys.stderr, flush=True)


def progress(
    items: Iterable[T], label: str, total: int, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """The items, with rank 0 telling how far they are: a bar on a terminal, and elsewhere a line
    every half a minute, so that short work says nothing.

    total: of the items' sizes. size: of an item, as the images in a chunk.
    """
    if not distributed.is_main():
        yield from items
        return
    if sys.stderr.isatty():
        with tqdm(total=total, desc=label, leave=False, dynamic_ncols=True) as bar:
            for item in items:
                yield item
                bar.update(size(item))
        return
    began = spoke = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if 0 < done < total and now - spoke >= PAUSE:
            spoke = now
            left = tqdm.format_interval((total - done) * (now - began) / done)
            print(f"{label} {done}/{total} · left {left}", file=sys.stderr, flush=True)


def _truncate(path: Path, start: int) -> None:
    """Leave the lines of steps before `start`; a last line cut short by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < start:
                kept.append(line + "\n")
        except ValueError:
            break
    write_text(path, "".join(kept))


def start_wandb(run_dir: Path, cfg: DictConfig) -> Any:
    """The W&B run, resumed by the manifest's id; None if off."""
    if cfg.wandb in ("off", False):  # YAML reads a bare `off` as false
        return None
    if cfg.wandb not in ("online", "offline"):
        raise InputError(f"logger.wandb={cfg.wandb} is unknown; write online, offline or off")
    import wandb
    from wandb.errors import Error

    manifest, config = run_dir / "manifest.json", run_dir / "config.yaml"
    online = cfg.wandb == "online"
    try:
        return wandb.init(
            id=read_json(manifest)["id"] if manifest.exists() else None,
            resume="allow" if online else None,  # offline runs join theirs by id at `wandb sync`
            name=run_dir.name,
            project=cfg.project,
            entity=cfg.entity,
            group=cfg.group,
            tags=list(cfg.tags),
            config=OmegaConf.to_container(OmegaConf.load(config)) if config.exists() else None,  # type: ignore[arg-type]
            dir=str(run_dir),
            mode=cfg.wandb,
            settings=wandb.Settings(silent=True, console="off"),
        )
    except Error as error:
        reason = " ".join(str(error).split())
        raise InputError(f"W&B: {reason}; log in, or set logger.wandb=offline") from error


# ---------------------------------------------------------------- pictures and tables


def grid(
    images: Tensor, captions: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """Images side by side, captions below, small ones enlarged two or three times by whole pixels.

    images: b 3 h w uint8, b ≥ 1. Raises ValueError on other shapes or another number of captions.
    """
    from PIL import Image, ImageDraw

    b, channels, h, w = images.shape
    if b == 0 or channels != 3 or str(images.dtype) != "torch.uint8":
        raise ValueError(f"want b 3 h w uint8, b ≥ 1; got {tuple(images.shape)} {images.dtype}")
    if captions is not None and len(captions) != b:
        raise ValueError(f"{len(captions)} captions for {b} images")
    zoom = max(1, min(3, TILE // w))
    h, w = h * zoom, w * zoom
    across = min(columns or round((b * h / w) ** 0.5) or 1, b)
    rows = -(-b // across)
    font, pad = _font(12), 6
    texts = [_wrap(c, font, w - 2) for c in captions] if captions is not None else [[]] * b
    line = 15
    tile_h = h + max(map(len, texts)) * line + (3 if captions is not None else 0)
    sheet = Image.new("RGB", (across * (w + pad) + pad, rows * (tile_h + pad) + pad), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (pixels, lines) in enumerate(zip(images.cpu(), texts, strict=True)):
        x, y = pad + i % across * (w + pad), pad + i // across * (tile_h + pad)
        tile = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(tile.resize((w, h), Image.Resampling.NEAREST), (x, y))
        for j, words in enumerate(lines):
            draw.text((x + 1, y + h + 3 + j * line), words, fill="black", font=font)
    return sheet


def _font(size: int) -> Any:
    """DejaVu Sans, which matplotlib ships: it has quotes, accents, Greek and Cyrillic."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """`text` in at most LINES lines of at most `width` pixels; a longer one ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:  # a word wider than a line is cut
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > LINES:
        last = lines[LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: LINES - 1], last + "…"]
    return lines


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], rule: bool = True
) -> str:
    """Columns of fixed width: the first to the left, the others to the right, floats to 3 decimals;
    with `rule` a line below the header.

    Raises ValueError if a row has not as many cells as the header.
    """
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    if any(len(row) != len(header) for row in cells):
        raise ValueError(f"every row needs {len(header)} cells")
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        rest = [c.rjust(n) for c, n in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *rest]).rstrip()

    lines = ["─" * (sum(widths) + 2 * (len(widths) - 1))] if rule else []
    return "\n".join([line(header), *lines, *map(line, cells)])


def curve(
    path: str | Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ylabel: str = "",
) -> Path:
    """Plot named (steps, values) to the PNG `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window, and none of pyplot's global state
    axes = figure.add_subplot()
    for i, (name, (steps, values)) in enumerate(series.items()):
        axes.plot(
            steps, values, label=name, color=COLOURS[i % len(COLOURS)], linewidth=1.5,
            marker="o" if len(steps) < 30 else None, markersize=3,
        )  # fmt: skip
    axes.set(xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1 or not ylabel:
        axes.legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
