"""Which samples advance next. No network: a sample is its number of steps here."""

import random
import subprocess
import sys

import pytest

from glide_ray.sampling.scheduler import DEADLINE_STRETCH, ScheduledSample, Scheduler


def submit(scheduler, *steps, group=None):
    """Queue a sample for each number of steps; returns the samples."""
    samples = [ScheduledSample(steps=count, group=group) for count in steps]
    for sample in samples:
        scheduler.submit(sample)
    return samples


def admit(scheduler):
    """Admit all that have room."""
    while scheduler.admit() is not None:
        pass


def step(scheduler):
    """Admit and advance, as the stepper does; returns the samples that advanced."""
    admit(scheduler)
    samples = scheduler.next_samples()
    scheduler.complete(samples)
    return samples


def finishing_order(scheduler):
    order = []
    while scheduler.in_flight or scheduler.queued:
        order += [sample for sample in step(scheduler) if not sample.steps_left]
    return order


def test_an_empty_scheduler_admits_and_advances_nothing():
    scheduler = Scheduler(4, 1)
    assert scheduler.admit() is None and scheduler.next_samples() == []
    assert (scheduler.in_flight, scheduler.queued, scheduler.waiting) == (0, 0, set())


def test_the_scheduler_is_usable_without_torch():
    script = "import sys, glide_ray.sampling.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_deadline_is_the_submit_time_plus_a_multiple_of_the_steps():
    scheduler = Scheduler(4, 1)
    (first,) = submit(scheduler, 10)
    assert first.deadline == DEADLINE_STRETCH * 10
    for _ in range(3):
        step(scheduler)
    (second,) = submit(scheduler, 2)
    assert second.deadline == 3 + DEADLINE_STRETCH * 2


def test_the_earliest_deadlines_are_admitted_first_up_to_the_capacity():
    scheduler = Scheduler(2, 1)
    long, short, middle = submit(scheduler, 9, 2, 5)
    assert [scheduler.admit(), scheduler.admit(), scheduler.admit()] == [short, middle, None]
    assert (scheduler.in_flight, scheduler.waiting) == (2, {long.ticket})


def test_samples_of_one_deadline_are_admitted_and_finish_in_the_order_of_their_requests():
    scheduler = Scheduler(2, 1)
    samples = submit(scheduler, 3, 3, 3, 3)
    assert finishing_order(scheduler) == samples


@pytest.mark.parametrize("width, moving", [(1, ["b"]), (2, ["b", "c"]), (3, ["b", "c", "a"])])
def test_a_step_advances_the_samples_with_the_earliest_deadlines(width, moving):
    scheduler = Scheduler(4, width)
    samples = dict(zip("abcd", submit(scheduler, 8, 1, 4, 9), strict=True))
    assert step(scheduler) == [samples[name] for name in moving]
    assert (scheduler.steps_done, scheduler.sample_steps_done) == (1, width)


def test_if_all_samples_fit_in_a_step_they_advance_in_the_order_of_admission():
    scheduler = Scheduler(4, 4)
    (long,) = submit(scheduler, 9)
    admit(scheduler)
    (short,) = submit(scheduler, 1)
    assert step(scheduler) == [long, short]


def test_a_short_sample_overtakes_a_long_one_in_progress():
    scheduler = Scheduler(4, 1)
    (long,) = submit(scheduler, 50)
    for _ in range(10):
        step(scheduler)
    (short,) = submit(scheduler, 5)
    assert finishing_order(scheduler) == [short, long]


def test_a_stream_of_short_samples_starves_no_long_one():
    """From 60 - 12 sample-steps on, every new short sample has a later deadline than the long."""
    scheduler = Scheduler(4, 1)
    (long,) = submit(scheduler, 20)
    while long.steps_left:
        if scheduler.in_flight + scheduler.queued < 2:
            submit(scheduler, 4)
        step(scheduler)
    assert scheduler.sample_steps_done <= DEADLINE_STRETCH * (20 - 4) + 4 + 20


def test_a_group_of_samples_has_the_deadlines_of_one_long_sample():
    scheduler = Scheduler(8, 1)
    group = submit(scheduler, 4, 4, 4, group="n=3")
    assert [sample.deadline for sample in group] == [
        DEADLINE_STRETCH * steps for steps in (4, 8, 12)
    ]
    step(scheduler)
    (late,) = submit(scheduler, 4, group="n=3")
    assert late.deadline == 1 + DEADLINE_STRETCH * (3 * 4 - 1 + 4)


def test_samples_without_a_group_do_not_count_as_one():
    scheduler = Scheduler(8, 1)
    samples = submit(scheduler, 4, 4) + submit(scheduler, 4, group="other")
    assert {sample.deadline for sample in samples} == {DEADLINE_STRETCH * 4}


def test_a_request_for_many_images_delays_one_for_a_single_image_by_at_most_one_image():
    scheduler = Scheduler(2, 1)
    many = submit(scheduler, *[4] * 6, group="many")
    step(scheduler)
    (single,) = submit(scheduler, 4, group="single")
    order = finishing_order(scheduler)
    assert order.index(single) <= 2
    assert [sample for sample in order if sample is not single] == many


def test_a_cancelled_sample_frees_its_place_queued_or_in_flight():
    scheduler = Scheduler(1, 1)
    flying, queued, next_one = submit(scheduler, 2, 3, 4)
    step(scheduler)
    assert scheduler.cancel(queued.ticket) and scheduler.cancel(flying.ticket)
    assert (scheduler.in_flight, scheduler.waiting) == (0, {next_one.ticket})
    assert scheduler.admit() is next_one


def test_an_unknown_finished_or_already_cancelled_sample_cannot_be_cancelled():
    scheduler = Scheduler(1, 1)
    (sample,) = submit(scheduler, 1)
    step(scheduler)
    (other,) = submit(scheduler, 1)
    assert other.ticket != sample.ticket
    assert scheduler.cancel(other.ticket)
    assert not any(scheduler.cancel(ticket) for ticket in (sample.ticket, other.ticket, 99))


@pytest.mark.parametrize("width", [1, 3, 8])
def test_every_sample_advances_exactly_its_own_number_of_steps(width):
    draw = random.Random(width)
    scheduler, advanced, submitted = Scheduler(8, width), [], []
    for _ in range(40):
        group = draw.choice([None, "a", "b"])
        submitted += submit(scheduler, draw.randint(1, 9), group=group)
        moved = step(scheduler)
        assert len(moved) == len(set(moved)) <= width and scheduler.in_flight <= 8
        advanced += moved
    while scheduler.in_flight or scheduler.queued:
        advanced += step(scheduler)
    assert [advanced.count(sample) for sample in submitted] == [
        sample.steps for sample in submitted
    ]
    assert scheduler.sample_steps_done == len(advanced)
