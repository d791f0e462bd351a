"""The order of a study's tasks, against what the stages of each course demand."""

import random

import pytest

from interp_vlm.study.agenda import Agenda, Course, Job
from interp_vlm.study.work import Task


def _name(course: int, stage: int, number: int) -> tuple[int, int, int]:
    return course, stage, number


def _courses(sizes: list[list[int]], begun: list, ended: list, weights: dict | None = None) -> list[Course]:
    """Courses of so many jobs a stage, which write down when they begin and end."""

    def job(name: tuple[int, int, int]) -> Job:
        def make() -> Task:
            begun.append(name)
            return Task(_name, name)

        return Job(make, ended.append, (weights or {}).get(name, 1))

    return [
        Course([[job((c, s, n)) for n in range(size)] for s, size in enumerate(stages)])
        for c, stages in enumerate(sizes)
    ]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_order_in_which_workers_finish_stages_follow_each_other_and_nothing_is_lost(seed):
    rng = random.Random(seed)
    sizes = [[rng.randrange(4) for _ in range(rng.randrange(1, 4))] for _ in range(rng.randrange(1, 5))]
    begun, ended, at_work = [], [], []
    agenda = Agenda(_courses(sizes, begun, ended))
    tasks, workers, waited = iter(agenda), rng.randrange(1, 4), 0
    while True:
        task = next(tasks, None) if len(at_work) < workers else None
        if task is not None:
            course, stage, _ = task.arguments
            before = [(course, s, n) for s in range(stage) for n in range(sizes[course][s])]
            assert set(before) <= set(ended), f"{task.arguments} was begun too early"
            at_work.append(task)
        elif at_work:
            waited += 1
            done = at_work.pop(rng.randrange(len(at_work)))
            agenda.done(done, done.call(*done.arguments))
        else:
            break
    every = [(c, s, n) for c, stages in enumerate(sizes) for s, size in enumerate(stages) for n in range(size)]
    assert sorted(begun) == sorted(ended) == every


def test_what_ends_with_long_work_is_begun_first_and_the_heaviest_of_a_stage():
    begun, ended = [], []
    weights = {(0, 0, 0): 5, (0, 0, 1): 6, (1, 0, 0): 1, (1, 1, 0): 9}
    agenda = Agenda(_courses([[2], [1, 1]], begun, ended, weights))
    for task in agenda:
        assert task is not None
        agenda.done(task, task.arguments)
    assert begun == [(1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 0, 0)]


def test_courses_of_a_lower_rank_come_first():
    begun: list = []
    made = _courses([[1], [1]], begun, [], {(0, 0, 0): 9})
    made[0].rank = 1
    for task in (agenda := Agenda(made)):
        agenda.done(task, None)
    assert begun == [(1, 0, 0), (0, 0, 0)]


def test_what_waits_for_a_task_that_never_ends_is_never_begun():
    begun: list = []
    tasks = iter(Agenda(_courses([[1, 1]], begun, [])))
    assert next(tasks) is not None
    assert [next(tasks) for _ in range(3)] == [None] * 3
    assert begun == [(0, 0, 0)]
