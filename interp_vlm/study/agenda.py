"""What is left to do of a study and in which order: each task as soon as what it needs is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from interp_vlm.study.work import Task

__all__ = ["Agenda", "Course", "Job"]


@dataclass(frozen=True, eq=False)
class Job:
    """A task that is made when its turn comes, since its arguments may be whole tables, and what takes its result."""

    make: Callable[[], Task]
    take: Callable[[Any], None]
    weight: int


class Course:
    """Stages of jobs: those of a stage need all the stages before, and not each other.

    Args:
        stages: the heaviest job of each is begun first.
        rank: courses of a lower rank come first, whatever their weight.
    """

    def __init__(self, stages: Iterable[Sequence[Job]], rank: int = 0) -> None:
        self._stages = deque(deque(sorted(stage, key=lambda job: -job.weight)) for stage in stages if stage)
        self._open = 0
        self.rank = rank

    @property
    def ready(self) -> bool:
        """Whether a job can be begun now."""
        return bool(self._stages and self._stages[0])

    @property
    def chain(self) -> int:
        """The least weight that one worker after another must do before the course has ended."""
        return sum(stage[0].weight for stage in self._stages if stage)

    def begin(self) -> Job:
        """The next job."""
        self._open += 1
        return self._stages[0].popleft()

    def end(self) -> None:
        """One of the begun jobs is done."""
        self._open -= 1
        if not self._open and not self._stages[0]:
            self._stages.popleft()


class Agenda:
    """The tasks of several courses, those with the most still to come first; `None` while all wait for others.

    Example:
        >>> found = []
        >>> def job(number, weight):
        ...     return Job(lambda: Task(abs, (number,)), found.append, weight)
        >>> agenda = Agenda([Course([[job(1, 1)]]), Course([[job(-2, 1), job(-3, 2)], [job(-4, 9)]])])
        >>> for task in agenda:
        ...     agenda.done(task, task.call(*task.arguments))
        >>> found
        [3, 2, 4, 1]
    """

    def __init__(self, courses: Sequence[Course]) -> None:
        self._courses = sorted(courses, key=lambda course: course.rank)
        self._begun: dict[Task, tuple[Course, Job]] = {}

    def __iter__(self) -> Iterator[Task | None]:
        while True:
            able = [course for course in self._courses if course.ready]
            if not able:
                if not self._begun:
                    return
                yield None
                continue
            course = min(able, key=lambda course: (course.rank, -course.chain))
            job = course.begin()
            task = job.make()
            self._begun[task] = course, job
            yield task

    def done(self, task: Task, result: Any) -> None:
        """Take a result in; what waited for it can be begun."""
        course, job = self._begun.pop(task)
        job.take(result)
        course.end()
