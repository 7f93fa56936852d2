"""The picture of the schedules."""

import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from torch import nn

from torch_pathloss import ArgumentError, PathLossModule, plot_schedules
from torch_pathloss.schedules import alternate, linear


def criterion():
    return PathLossModule(
        {"": nn.L1Loss(), "a": nn.L1Loss(), "b": nn.L1Loss()},
        weights={"": 0.5, "a": linear(0.0, 1.0, steps=2), "b": 3.0 * alternate(1, 2, phase=1)},
    )


def lines(axis):
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


def test_each_weight_is_drawn_over_its_step_with_gaps_where_the_term_is_inactive():
    figure = plot_schedules(criterion(), steps=4)
    found = lines(figure.axes[0])
    assert list(found) == ['""', "a", "b"]
    for name, weights in {'""': [0.5], "a": [0.0, 0.5, 1.0, 1.0], "b": [np.nan, 3.0, 3.0, np.nan]}.items():
        ends = np.linspace(0, 4, len(weights) + 1)
        np.testing.assert_array_equal(found[name].get_xdata(), np.stack([ends[:-1], ends[1:]], 1).ravel())
        np.testing.assert_array_equal(found[name].get_ydata(), np.repeat(weights, 2))
    assert [line.get_linestyle() for line in found.values()] == ["--", "-", "-"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ['""', "a", "b"]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("step", "weight")
    figure.savefig(io.BytesIO())


def test_the_step_is_marked_and_stays():
    module = criterion()
    assert len(plot_schedules(module, steps=4).axes[0].lines) == 3
    module.step()
    weights = module.weights.value.tolist()
    marks = [line for line in plot_schedules(module, steps=4).axes[0].lines if line.get_label().startswith("_")]
    assert [list(mark.get_xdata()) for mark in marks] == [[1, 1]]
    assert module.weights.value.tolist() == weights
    assert module.weights.step.item() == 1


def test_it_draws_where_it_is_told_to():
    left, right = Figure().subplots(1, 2)
    assert plot_schedules(criterion(), steps=2, ax=right) is right.figure
    assert lines(right)
    assert not lines(left)


def test_what_cannot_be_drawn_raises():
    for steps, shown in ((0, "0 of type int"), (2.5, "2.5 of type float"), (True, "True of type bool")):
        with pytest.raises(ArgumentError) as caught:
            plot_schedules(criterion(), steps=steps)
        assert str(caught.value) == f"steps must be a whole number of at least 1, not {shown}."

    def until_two(step):
        return 1.0 if step < 2 else None

    module = PathLossModule({"a": nn.L1Loss()}, weights={"a": until_two})
    plot_schedules(module, steps=2)
    with pytest.raises(ArgumentError) as caught:
        plot_schedules(module, steps=3)
    assert str(caught.value) == (
        "The weight of 'a': the schedule until_two gave None of type NoneType at step 2. It must give a finite number."
    )


def test_importing_the_package_does_not_import_matplotlib_and_without_it_the_message_names_the_extra():
    code = (
        "import sys, torch_pathloss\n"
        "from torch import nn\n"
        "print('matplotlib' in sys.modules)\n"
        "sys.modules['matplotlib'] = None\n"
        "try:\n"
        "    torch_pathloss.plot_schedules(torch_pathloss.PathLossModule(nn.MSELoss()), steps=2)\n"
        "except torch_pathloss.MissingPackageError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == (
        "False\nplot_schedules needs matplotlib, which is not installed. Run: pip install 'torch-pathloss[plot]'\n"
    )
