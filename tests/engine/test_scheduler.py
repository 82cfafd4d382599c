from upslope.engine import Request, Sampling
from upslope.engine.scheduler import Scheduler


def make(samples, slots, lengths=None):
    lengths = lengths or [1] * len(samples)
    requests = [
        Request((1,) * n, k, Sampling(4), samples=s) for k, (s, n) in enumerate(zip(samples, lengths, strict=True))
    ]
    return Scheduler(requests, slots, version=0)


def test_samples_of_a_prompt_are_admitted_together_and_the_rest_later():
    scheduler = make([3, 2], slots=4)
    assert [(a.request, a.slots) for a in scheduler.admit(100)] == [(0, (0, 1, 2)), (1, (3,))]
    assert scheduler.admit(100) == []
    assert scheduler.retire([0]) == [(3, 0)]
    assert [(a.request, a.slots) for a in scheduler.admit(100)] == [(1, (3,))]


def test_a_token_budget_holds_prompts_back_but_never_all():
    scheduler = make([1, 1, 1], slots=4, lengths=[50, 60, 5])
    assert [a.request for a in scheduler.admit(10)] == [0]
    assert [a.request for a in scheduler.admit(65)] == [1, 2]


def test_live_slots_stay_without_gaps_and_results_keep_their_order():
    scheduler = make([5], slots=5)
    scheduler.admit(100)
    samples = lambda: [c.sample for c in scheduler.running]
    assert scheduler.retire([1, 4]) == [(3, 1)]
    assert samples() == [0, 3, 2]
    assert scheduler.retire([0, 1, 2]) == []
    assert scheduler.done and [c.sample for c in scheduler.results()] == [0, 1, 2, 3, 4]
