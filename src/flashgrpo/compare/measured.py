"""diagnosis.json in tables: where grouping and rectification have something to do on this problem."""

from flashgrpo.compare.table import grid
from flashgrpo.report.record import Row


def diagnosis_as_markdown(diagnosis: Row) -> str:
    """Write what `diagnostics.diagnose` measured at the base weights, as the end of comparison.md."""
    variance, level = [], []
    for noise, by_start in diagnosis["noises"].items():
        for start, measured in by_start.items():
            name = f"{noise}; {start} initial noise"
            for window, split in measured["reward_variance"]["windows"].items():
                cells = [_estimate(split[part], ".4f") for part in ("within", "total", "share")]
                variance.append([name, window, *cells])
            for window, flat in measured["gradient_by_step"]["windows"].items():
                cells = [_estimate(flat[part], ".2f") for part in ("uniform", "rectified", "score", "rectified_score")]
                level.append([name, window, f"{flat['predicted']:.2f}", *cells])
    consistency = [
        [
            name,
            _estimate(measured["cosine"], "+.4f"),
            "infinite" if measured["noise_scale"] is None else f"{measured['noise_scale']:,.0f}",
            f"{measured['drift']:g}",
        ]
        for name, measured in diagnosis["consistency"].items()
    ]
    effort = diagnosis["effort"]
    parts = [
        "## Diagnosis of the base model",
        f"Seed {diagnosis['seed']}; {effort['prompts']} prompts, {effort['members']} samples a step and prompt, "
        f"{effort['updates']} updates of {diagnosis['prompts']} x {diagnosis['group_size']} samples; 95 % intervals.",
        "Variance of the reward within a prompt. A group that shares its step sees `same step`, samples that draw one "
        "each see `any step`; `between` is the share that grouping takes away.",
        grid(["noise", "steps", "same step", "any step", "between"], variance),
        "Spread of the gradient norm over the steps (standard deviation / mean), of the update's gradient without and "
        "with rectification, and of single samples' scores, for which the theory predicts that of lambda, and 0.",
        grid(["noise", "steps", "lambda", "update", "rectified", "score", "score, rectified"], level),
        "Mean cosine between independent gradients of one policy, and the batch at which signal and noise are equal "
        "(samples). Drift is the largest |ratio - 1| in the replay, which has to be 0.",
        grid(["algorithm", "cosine", "noise scale", "drift"], consistency),
    ]
    return "\n\n".join(parts) + "\n"


def _estimate(estimate: Row, form: str) -> str:
    low, high = estimate["interval"]
    return f"{estimate['value']:{form}} ({low:{form}} to {high:{form}})"
