"""The diffusion process against closed forms."""

import math

import pytest
import torch

from glide_ray.diffusion.guidance import classifier_free
from glide_ray.diffusion.loss import (
    discretised_log_likelihood,
    gaussian_kl,
    hybrid_loss,
    min_snr_weight,
)
from glide_ray.diffusion.process import eps_from_x0, posterior_mean, q_sample, x0_from_eps
from glide_ray.diffusion.samplers import (
    SAMPLERS,
    History,
    Known,
    Step,
    StepInput,
    renoise_known,
    step_each,
)
from glide_ray.diffusion.schedule import (
    RespacedSchedules,
    ScheduleError,
    check_pure_noise,
    grid,
    join,
    kept_timesteps,
    make_schedule,
    respace,
)
from glide_ray.tensors import ModelOutput


def full(index, batch=2):
    return torch.full((batch,), index)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_respacing_preserves_alpha_bar_at_the_kept_timesteps(name):
    schedule = make_schedule(name)
    short = respace(schedule, "10,10,3,2,2")
    assert len(short) == 27
    assert torch.equal(short.alpha_bar, schedule.alpha_bar[short.timestep])
    assert (
        torch.equal(short.alpha_bar_prev[1:], short.alpha_bar[:-1]) and short.alpha_bar_prev[0] == 1
    )


def test_the_posterior_agrees_with_bayes_rule():
    """Product of q(x_{t-1}|x_0) and q(x_t|x_{t-1}), both normal, for one pixel."""
    schedule = respace(make_schedule("linear"), "50")
    for index in (1, 17, 49):
        abar, prev = schedule.alpha_bar[index].item(), schedule.alpha_bar_prev[index].item()
        alpha = abar / prev
        precision = 1 / (1 - prev) + alpha / (1 - alpha)
        assert schedule.posterior_variance[index].item() == pytest.approx(1 / precision, rel=1e-9)
        x0, x = 0.3, -1.1
        mean = (math.sqrt(prev) * x0 / (1 - prev) + math.sqrt(alpha) * x / (1 - alpha)) / precision
        ours = posterior_mean(
            schedule, torch.full((1, 1, 1, 1), x0), torch.full((1, 1, 1, 1), x), full(index, 1)
        )
        assert ours.item() == pytest.approx(mean, abs=1e-6)


def test_eps_and_x0_convert_into_each_other():
    schedule, i = make_schedule("cosine"), torch.tensor([3, 500])
    x0, noise = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4)
    x = q_sample(schedule, x0, i, noise)
    assert torch.allclose(x0_from_eps(schedule, x, i, noise), x0, atol=1e-5)
    assert torch.allclose(eps_from_x0(schedule, x, i, x0), noise, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_gaussian_data_with_its_exact_denoiser_gives_its_standard_deviation(sampler):
    """With exact eps and variance for x_0 ~ N(0, s^2), a step introduces no error.

    The optimal eps is linear in x, and the variance of x_{t-1} given x_t has a closed form.
    """
    s, schedule = 0.2, respace(make_schedule("linear"), "250")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 32, 32, generator=generator)
    history = History.none(x)
    for index in reversed(range(len(schedule))):
        abar, before = (
            schedule.alpha_bar[index].item(),
            schedule.alpha_bar[index - 1].item() if index else 1.0,
        )
        eps = x * math.sqrt(1 - abar) / (abar * s**2 + 1 - abar)
        variance = 0.0
        if index:
            # The model's variance value interpolates, in logarithms, between beta~ (x_0 known) and
            # beta (x_0 unknown, of unit variance).
            beta = 1 - abar / before
            lower = beta * (1 - before) / (1 - abar)
            exact = lower + before * (beta / (1 - abar)) ** 2 * s**2 * (1 - abar) / (
                abar * s**2 + 1 - abar
            )
            variance = 2 * math.log(exact / lower) / math.log(beta / lower) - 1
        output = ModelOutput(eps, torch.full_like(x, variance))
        noise = torch.randn(x.shape, generator=generator)
        step = SAMPLERS[sampler](
            StepInput(schedule, output, x, full(index, 8), noise, history=history)
        )
        x, history = step.x, history.then(step)
    # DDIM has an error of 2% with 250 steps.
    assert x.std().item() == pytest.approx(s, rel={"ddim": 0.03}.get(sampler, 0.01))
    assert abs(x.mean().item()) < 0.01


def ode_error(sampler, spacing, s=0.3):
    """Relative error of a deterministic sampler against the probability-flow ODE.

    For data from N(0, s^2) the ODE ends at x_T s / std_T.
    """
    schedule = respace(make_schedule("cosine"), spacing)
    x = torch.tensor([0.2, -0.5, 0.9]).reshape(1, 3, 1, 1)
    first, history = x, History.none(x)
    top = schedule.alpha_bar[-1].item()
    for index in reversed(range(len(schedule))):
        abar = schedule.alpha_bar[index].item()
        output = ModelOutput(x * math.sqrt(1 - abar) / (abar * s**2 + 1 - abar), x)
        step = SAMPLERS[sampler](
            StepInput(schedule, output, x, full(index, 1), torch.zeros_like(x), history=history)
        )
        x, history = step.x, history.then(step)
    return (x / first * math.sqrt(top * s**2 + 1 - top) / s - 1).abs().max().item()


@pytest.mark.parametrize("s", [0.3, 0.9])
def test_the_corrector_of_unipc_raises_the_order_to_three(s):
    """Half the step in lambda divides the error by 8 (Zhao et al. 2023, theorem 3.1)."""
    error = {n: ode_error("unipc", f"lambda{n}", s) for n in (20, 40, 80)}
    assert error[20] / error[40] > 7
    assert error[40] / error[80] > 7
    for steps in (40, 80):
        assert error[steps] < ode_error("dpm++", f"lambda{steps}", s) / 2


@pytest.mark.parametrize(
    ("sampler", "spacing"), [("dpm++", "{}"), ("plms", "{}"), ("unipc", "lambda{}")]
)
def test_multistep_samplers_follow_the_ode_several_times_more_closely_than_ddim(sampler, spacing):
    for steps in (20, 30):
        spaced = spacing.format(steps)
        assert ode_error(sampler, spaced) < ode_error("ddim", spaced) / 3


def test_the_first_step_of_a_multistep_sampler_equals_ddim():
    schedule, i, x = respace(make_schedule("cosine"), "20"), full(12), torch.randn(2, 3, 4, 4)
    output, noise = ModelOutput(torch.randn_like(x), torch.zeros_like(x)), torch.zeros_like(x)
    step_input = StepInput(schedule, output, x, i, noise)
    for sampler in ("dpm++", "plms", "unipc"):
        assert torch.allclose(
            SAMPLERS[sampler](step_input).x, SAMPLERS["ddim"](step_input).x, atol=1e-6
        )


def guided_images(sampler, gradient, s=0.3):
    """Images of N(0, s^2) by its exact denoiser, with the same guidance gradient at every step."""
    schedule = respace(make_schedule("cosine"), "mixed30")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 32, 32, generator=generator)
    history = History.none(x)
    for index in reversed(range(len(schedule))):
        abar = schedule.alpha_bar[index].item()
        eps = x * math.sqrt(1 - abar) / (abar * s**2 + 1 - abar)
        output, noise = (
            ModelOutput(eps, -torch.ones_like(x)),
            torch.randn(x.shape, generator=generator),
        )
        gradients = torch.full_like(x, gradient)
        step = SAMPLERS[sampler](
            StepInput(schedule, output, x, full(index, 4), noise, None, gradients, history)
        )
        x, history = step.x, history.then(step)
    return x


def test_a_gradient_moves_the_pictures_of_all_samplers_alike_and_burns_none():
    """Deterministic samplers agree to a tenth; ancestral sampling forgets a part of every move.

    A gradient of 1 is large: it moves pictures of standard deviation 0.3 by 0.35.
    """
    moved = {name: guided_images(name, 1.0) for name in SAMPLERS}
    mean = {name: images.mean().item() for name, images in moved.items()}
    for name in ("plms", "dpm++", "unipc"):
        assert mean[name] == pytest.approx(mean["ddim"], rel=0.1)
    assert 0.5 < mean["ancestral"] / mean["ddim"] < 1
    for images in moved.values():
        assert (images.abs() > 0.99).float().mean() < 0.03


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm++", "unipc"])
def test_a_large_gradient_leaves_the_predicted_picture_in_range(sampler):
    assert guided_images(sampler, 100.0).abs().max() <= 1.0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clip_guidance_does_not_move_known_pixels_in_the_last_step(sampler):
    schedule = respace(make_schedule("cosine"), "5")
    known = Known(torch.rand(2, 3, 8, 8) * 2 - 1, (torch.rand(2, 1, 8, 8) > 0.5).float())
    x = torch.randn(2, 3, 8, 8)
    output = ModelOutput(torch.randn_like(x), torch.zeros_like(x))
    zeros, ones = torch.zeros_like(x), torch.ones_like(x)
    after = SAMPLERS[sampler](StepInput(schedule, output, x, full(0), zeros, known, ones)).x
    kept = known.mask.expand_as(x) > 0
    assert torch.equal(after[kept], known.image[kept])


def test_renoised_known_pixels_have_the_distribution_of_their_timestep():
    schedule, i = respace(make_schedule("cosine"), "10"), full(6)
    known = Known(torch.full((2, 3, 64, 64), 0.5), torch.ones(2, 1, 64, 64))
    x = renoise_known(schedule, torch.zeros(2, 3, 64, 64), i, torch.randn(2, 3, 64, 64), known)
    previous = schedule.alpha_bar[5].item()
    assert x.mean().item() == pytest.approx(0.5 * math.sqrt(previous), abs=0.02)
    assert x.std().item() == pytest.approx(math.sqrt(1 - previous), rel=0.02)
    untouched = renoise_known(
        schedule,
        torch.zeros(2, 3, 64, 64),
        i,
        torch.randn(2, 3, 64, 64),
        Known(known.image, 0 * known.mask),
    )
    assert not untouched.any()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_pixels_are_reproduced_exactly(sampler):
    schedule = respace(make_schedule("cosine"), "7")
    known = Known(torch.rand(2, 3, 8, 8) * 2 - 1, (torch.rand(2, 1, 8, 8) > 0.5).float())
    x = torch.randn(2, 3, 8, 8)
    for index in reversed(range(7)):
        output = ModelOutput(torch.randn_like(x), torch.rand_like(x) * 2 - 1)
        noise = torch.randn_like(x)
        x = SAMPLERS[sampler](StepInput(schedule, output, x, full(index), noise, known)).x
    kept = known.mask.expand_as(x) > 0
    assert torch.equal(x[kept], known.image[kept])


def test_samples_of_different_schedules_and_timesteps_share_a_step():
    parts = [respace(make_schedule("cosine"), spacing) for spacing in ("5", "ddim25")]
    both, i = join(parts), torch.tensor([3, 5 + 20])
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    output = ModelOutput(torch.randn_like(x), torch.rand_like(x))
    together = SAMPLERS["ancestral"](StepInput(both, output, x, i, noise)).x
    for row, (schedule, index) in enumerate(zip(parts, (3, 20), strict=True)):
        own = slice(row, row + 1)
        alone = SAMPLERS["ancestral"](
            StepInput(schedule, output[own], x[own], full(index, 1), noise[own])
        ).x
        assert torch.equal(together[own], alone)


def test_samples_of_different_samplers_share_a_step():
    """Each row equals the row of a step in which its sampler moves all rows."""
    schedule, x = respace(make_schedule("cosine"), "20"), torch.randn(5, 3, 8, 8)
    history = History.none(x)
    for _ in range(2):
        history = history.then(Step(*(torch.randn_like(x) for _ in range(4))))
    step_input = StepInput(
        schedule,
        ModelOutput(torch.randn_like(x), torch.rand_like(x) * 2 - 1),
        x,
        torch.tensor([3, 0, 19, 7, 11]),
        torch.randn_like(x),
        Known(torch.rand_like(x) * 2 - 1, (torch.rand(5, 1, 8, 8) > 0.5).float()),
        torch.randn_like(x),
        history,
    )
    names = ["dpm++", "ancestral", "plms", "unipc", "ddim"]
    together = step_each(names, step_input)
    for row, name in enumerate(names):
        alone = SAMPLERS[name](step_input)
        assert torch.equal(together.x[row], alone.x[row])
        assert torch.equal(together.x0[row], alone.x0[row])
        assert torch.equal(together.remembered[row], alone.remembered[row])


def test_guidance_extrapolates_per_sample_and_scale_one_skips_the_unconditional_call():
    batch_sizes = []

    def paired(x, timestep):
        batch_sizes.append(len(x))
        eps = torch.cat([torch.full((3, 3, 2, 2), 2.0), torch.full((len(x) - 3, 3, 2, 2), 1.0)])
        return ModelOutput(eps, eps)

    output = classifier_free(paired, torch.tensor([1.0, 3.0, 0.0]))(
        torch.zeros(3, 3, 2, 2), torch.zeros(3)
    )
    assert batch_sizes == [5]
    assert output.eps[:, 0, 0, 0].tolist() == [2.0, 4.0, 1.0]
    assert output.variance[:, 0, 0, 0].tolist() == [2.0, 2.0, 2.0]


def test_the_kl_of_two_normals_agrees_with_torch():
    mean1, mean2, log1, log2 = torch.randn(4, 100)
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean1, (log1 / 2).exp()),
        torch.distributions.Normal(mean2, (log2 / 2).exp()),
    )
    assert torch.allclose(gaussian_kl(mean1, log1, mean2, log2), theirs, rtol=1e-4, atol=1e-5)


def test_the_likelihoods_of_all_256_pixel_values_sum_to_one():
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    total = discretised_log_likelihood(values, torch.tensor(0.1), torch.tensor(-2.0)).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-6)


def test_the_variance_term_sends_no_gradient_through_eps():
    schedule, i = make_schedule("cosine"), torch.tensor([5, 400])
    x0, noise = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    eps, variance = (
        torch.randn(2, 3, 4, 4, requires_grad=True),
        torch.zeros(2, 3, 4, 4, requires_grad=True),
    )
    loss = hybrid_loss(
        schedule, ModelOutput(eps, variance), x0, q_sample(schedule, x0, i, noise), i, noise
    )
    assert torch.autograd.grad(loss.vb.sum(), eps, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(loss.vb.sum(), variance, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(loss.mse.sum(), variance, allow_unused=True)[0] is None


@pytest.mark.parametrize(
    "spacing", ["0", "-3", "many", "", "1001", "300,800", "ddim999", "5,,3", "ddim", "1,"]
)
def test_an_invalid_respacing_is_refused_in_one_sentence(spacing):
    with pytest.raises(ScheduleError) as refusal:
        kept_timesteps(1000, spacing)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) > 30


@pytest.mark.parametrize("spacing", ["10,1", "ddim2", "ddim5", "t0,500"])
def test_a_respacing_that_begins_in_the_middle_of_the_process_is_refused(spacing):
    process = make_schedule("cosine")
    with pytest.raises(ScheduleError, match="begins at timestep"):
        check_pure_noise(process, grid(process, spacing)[-1], spacing)


@pytest.mark.parametrize(
    "spacing",
    ["lambda1", "lambda1000", "edm0", "mixed1001", "t", "t5,4", "t0,0,999", "t-1,9", "t1000"],
)
def test_an_invalid_grid_is_refused_in_one_sentence(spacing):
    with pytest.raises(ScheduleError) as refusal:
        respace(make_schedule("cosine"), spacing)
    assert "\n" not in str(refusal.value) and spacing in str(refusal.value)


def test_a_single_step_begins_at_the_noisiest_timestep():
    assert grid(make_schedule("cosine"), "1") == [999]


def test_even_names_the_evenly_spaced_timesteps():
    assert grid(make_schedule("cosine"), "even27") == kept_timesteps(1000, "27")


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("spacing", ["lambda", "mixed", "edm"])
def test_grids_have_as_many_steps_as_asked_up_to_all(name, spacing):
    process = make_schedule(name)
    for count in (2, 3, 8, 27, 200, 900):
        kept = grid(process, f"{spacing}{count}")
        assert len(kept) == count and kept == sorted(set(kept)) and kept[0] == 0
    assert grid(process, "mixed1000") == list(range(1000))


def test_grids_are_even_in_their_measure_of_noise():
    """Up to the rounding to whole timesteps: at most half the distance of two timesteps."""
    process = make_schedule("cosine")
    sigma = ((1 - process.alpha_bar) / process.alpha_bar).sqrt()
    for spacing, measure in (("lambda15", sigma.log()), ("edm15", sigma ** (1 / 7))):
        kept = grid(process, spacing)
        assert process.alpha_bar[kept[-1]] >= 1 / (1 + math.exp(2 * 5.1))
        even = torch.linspace(measure[0], measure[kept[-1]], 15, dtype=torch.float64)
        rounding = (measure[1:] - measure[:-1])[[min(t, 998) for t in kept]].abs() / 2
        assert ((measure[kept] - even).abs() <= 1.5 * rounding.clamp(min=1e-9)).all()


def test_respacing_keeps_exactly_the_requested_number_of_steps():
    for count in (1, 2, 3, 27, 999, 1000):
        kept = kept_timesteps(1000, count)
        assert len(kept) == len(set(kept)) == count and kept == sorted(kept)


def test_min_snr_caps_the_weight_of_the_error_of_x0():
    schedule, i = make_schedule("cosine"), torch.arange(1000)
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    # The squared error of eps is SNR times that of x_0.
    of_x0 = min_snr_weight(schedule, i, 5.0).double() * snr
    assert torch.allclose(of_x0, snr.clamp(max=5), rtol=1e-5)
    assert torch.allclose(
        min_snr_weight(schedule, i, 5.0, least=1.0).double() * snr,
        (snr + 1).clamp(max=5),
        rtol=1e-5,
    )


def test_with_least_1_the_weighted_error_of_eps_equals_the_error_of_v():
    schedule, i = make_schedule("cosine"), torch.tensor([400, 700, 990])
    x0, noise, wrong = (torch.randn(3, 3, 4, 4).double() for _ in range(3))
    signal = schedule.at("alpha_bar", i).sqrt()
    v, x_t = (
        signal * noise - (1 - signal**2).sqrt() * x0,
        signal * x0 + (1 - signal**2).sqrt() * noise,
    )
    eps = signal * (v + wrong) + (1 - signal**2).sqrt() * x_t
    weighted = (eps - noise).square().flatten(1).mean(1) * min_snr_weight(
        schedule, i, 1e9, least=1.0
    )
    assert torch.allclose(weighted, wrong.square().flatten(1).mean(1), rtol=1e-5)


def test_the_weight_changes_the_loss_but_not_the_reported_mse_and_bound():
    schedule, i = make_schedule("cosine"), torch.tensor([10, 900])
    x0, noise, eps = (torch.randn(2, 3, 4, 4) for _ in range(3))
    output, x_t = ModelOutput(eps, torch.zeros_like(eps)), q_sample(schedule, x0, i, noise)
    weight = min_snr_weight(schedule, i, 5.0, least=1.0)
    assert weight[0] < 1 < weight[1]
    even, weighted = (
        hybrid_loss(schedule, output, x0, x_t, i, noise, loss_weight)
        for loss_weight in (None, weight)
    )
    assert torch.equal(even.mse, weighted.mse) and torch.equal(even.vb, weighted.vb)
    assert torch.allclose(weighted.total, even.mse * weight + even.vb * weight.clamp(max=1))


def test_variations_of_many_strengths_do_not_fill_the_memory():
    schedules = RespacedSchedules(make_schedule("cosine"), "cpu")
    for first in range(2 * RespacedSchedules.CACHED):
        assert schedules.timesteps(f"t{first},999") == [first, 999]
    assert schedules._computed.cache_info().currsize == RespacedSchedules.CACHED
    assert schedules.schedule("t0,999").timestep.tolist() == [0, 999]
