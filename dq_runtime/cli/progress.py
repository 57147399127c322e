"""Progress bars for the stages of a quantization: ETA, current figures, peak memory."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dq_runtime.environment import peak_memory
from dq_runtime.request import Stage


class Bars:
    """A ``Listener``: one bar a stage, on standard error, so that standard output stays clean."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self._plain = not console.is_terminal

    def __enter__(self) -> Bars:
        if not self._plain:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._plain:
            self._progress.stop()

    def stage(self, title: str) -> Stage:
        task = self._progress.add_task(title, total=None, figures="")
        said = 0  # tenths of the stage that a log file has been told of
        names = {"kl": "KL {:.3f}", "rounded": "{:.1%} decided"}

        def show(step: int, total: int, **figures: float) -> None:
            parts = [names[name].format(value) for name, value in figures.items() if name in names]
            if figures:
                parts.append(f"peak {peak_memory('cpu') / 1e9:.1f} GB")
            self._progress.update(task, completed=step, total=total, figures=", ".join(parts))
            nonlocal said
            if self._plain and (step == total or (total >= 10 and step * 10 // total > said)):
                said = step * 10 // total
                self._line(title, step, total, parts)

        return show

    def _line(self, title: str, step: int, total: int, parts: list[str]) -> None:
        """In a log file, a line at every tenth of a stage instead of a bar."""
        remaining = self._progress.tasks[-1].time_remaining
        if remaining is not None and step < total:
            parts = [*parts, f"{remaining:.0f} s left"]
        self._progress.console.print(f"{title}: {', '.join([f'{step}/{total}', *parts])}", highlight=False)
