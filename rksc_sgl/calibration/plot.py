"""Risk against saving, as a picture."""

from __future__ import annotations

from pathlib import Path

from rksc_sgl.calibration.profile import Profile
from rksc_sgl.errors import ProfileError


def plot_risk(profile: Profile, path: str | Path) -> None:
    """Draw the measured curve and the certified points of a profile into a PNG.

    Across: the share of the model's layers that is saved. Up: the share of calls whose verdict is not that of full
    depth. Each certified point has its certified risk as a bar above it.

    Raises:
        ProfileError: the profile holds neither a curve nor points, or the file cannot be written.
    """
    if not profile.curve and not profile.points:
        raise ProfileError("curve: the profile holds no measurement to draw")
    # the pyplot interface would choose a window system; the figure alone needs none
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    saving = [100 * (1 - point.layers_fraction) for point in profile.curve]
    axes.plot(saving, [100 * point.flip_rate for point in profile.curve], label="verdict differs, measured")
    axes.plot(saving, [100 * point.selection_rate for point in profile.curve], "--", label="other branch, measured")
    for point in profile.points:
        place, measured = 100 * (1 - point.layers_fraction), 100 * point.flip_mean
        axes.plot([place, place], [measured, 100 * point.risk], color="0.5", linewidth=1)
        label = f"certified at {100 * point.risk:g} % (t={point.t:g}, {point.scope})"
        axes.plot([place], [100 * point.risk], "v", label=label)
    axes.set_xlabel("layers saved, %")
    axes.set_ylabel("risk, %")
    axes.set_title(f"Early exit of verification, confidence {100 * (1 - profile.alpha):g} %")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    try:
        canvas.print_png(str(path))
    except OSError as error:
        raise ProfileError(f"{path}: the plot could not be written: {error}") from error
