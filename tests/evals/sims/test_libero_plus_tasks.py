import pytest

from gear_jax.evals.sims.libero_plus_tasks import (
    AXES,
    SUITES,
    TASKS,
    TOTAL,
    axis_of,
    noise_of,
    num_tasks,
    split,
)

BOWL = "pick_up_the_black_bowl_next_to_the_plate_and_place_it_on_the_plate"
STOVE = "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it"
LIKE_A_SUFFIX = "pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate"
PLAIN = "view_0_0_100_0_0_initstate_0"


@pytest.mark.parametrize(
    ("original", "end", "axis"),
    [
        (BOWL, "_view_344_0_100_0_0_initstate_0", "camera"),
        (BOWL, "_view_0_15_100_0_0_initstate_0", "camera"),
        (STOVE, "_view_0_0_129_0_0_initstate_0", "camera"),
        (BOWL, "_view_0_0_100_-3_5_initstate_0", "camera"),
        (BOWL, "_view_0_0_100_0_0_initstate_499", "robot"),
        (STOVE, "_view_0_0_100_0_0_initstate_1", "robot"),
        (BOWL, f"_language_50_{PLAIN}", "language"),
        (BOWL, f"_{PLAIN}_noise_34", "noise"),
        (LIKE_A_SUFFIX, "_light_12", "light"),
        (LIKE_A_SUFFIX, "_table_1", "background"),
        (BOWL, "_tb_12", "background"),
        (BOWL, "_level1_sample1", "layout"),
        ("open_the_middle_drawer_of_the_cabinet", "_moved_level5_sample2", "layout"),
        (LIKE_A_SUFFIX, "_add_10", "layout"),
    ],
)
def test_the_end_of_a_name_says_the_axis_and_the_rest_is_liberos_task(original, end, axis):
    assert axis_of(original + end) == axis
    assert split(original + end) == (original, end)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (BOWL, "is none of LIBERO-Plus"),
        ("_light_1", "is none of LIBERO-Plus"),
        (f"{BOWL}_light_1_again", "is none of LIBERO-Plus"),
        (f"{BOWL}_{PLAIN}", "perturbs nothing"),
        (f"{BOWL}_view_3_0_100_0_0_initstate_7", r"perturbs \['camera', 'robot'\]"),
        (f"{BOWL}_language_1_view_0_0_100_0_0_initstate_7", r"perturbs \['language', 'robot'\]"),
    ],
)
def test_a_name_that_perturbs_nothing_or_two_things_is_refused(name, words):
    with pytest.raises(ValueError, match=words):
        axis_of(name)


def test_the_number_of_a_noise():
    assert noise_of(f"{BOWL}_{PLAIN}_noise_34") == 34
    assert noise_of(f"{BOWL}_light_3") == 0


def test_the_benchmark_has_10030_tasks_as_published():
    assert TOTAL == 10_030
    assert {axis: sum(TASKS[axis]) for axis in AXES} == {
        "camera": 1599, "robot": 1550, "language": 1537, "light": 1142, "background": 1076,
        "noise": 1601, "layout": 1525,
    }  # fmt: skip
    suites = [sum(num_tasks(axis, suite) for axis in AXES) for suite in SUITES]
    assert suites == [2402, 2518, 2591, 2519]
