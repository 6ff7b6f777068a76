"""Shares and strengths: on made curves whose right answers can be computed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from fastattr import Attribution
from fastattr.attributor.attribution import Reach
from fastattr.students.calibration import Calibration, fit_curves
from fastattr.students.shares import COPY_SHARE, UNASSIGNED, dominant, share_table
from tests.students.test_calibrate import CORPUS, flat, world


def shares(calibration: Calibration, similarity: list[float], names: list[str], **options: object) -> dict[str, float]:
    """By name, each image a family of its own unless said otherwise; what is not named under None.

    The curve is read at half the similarity: 1 is its upper end, and only 2 is the picture itself.
    """
    count, calibration = len(names), replace(calibration, knots=calibration.knots / 2)
    options = {"families": np.arange(count), "family_sizes": np.ones(count), **options}
    table = share_table(calibration, np.array(similarity) / 2, {"creator": np.array(names)}, by="creator", **options)
    assert table["share"].sum() == pytest.approx(1)
    assert ((table["low"] <= table["share"]) & (table["share"] <= table["high"])).all()
    names = [name if named else None for name, named in zip(table["creator"], table["named"], strict=True)]
    return dict(zip(names, table["share"], strict=True))


def test_shares_are_of_what_exceeds_unrelated_images():
    """Excesses 10 and 5 of a curve from 1 to 11 above a level of 1, which itself may be chance: 10, 5 and 1 of 16."""
    found = shares(flat(1.0, influence=(1.0, 11.0)), [1.0, 0.5, 0.0, 0.0], ["Ada", "Bob", "Ada", "Cy"])
    assert found == pytest.approx({"Ada": 10 / 16, "Bob": 5 / 16, None: 1 / 16})


def test_near_duplicates_count_once():
    """Five skin tones of one drawing would otherwise make their artist five times as influential."""
    calibration = flat(1.0, influence=(1.0, 11.0))
    once = shares(calibration, [1.0, 0.5], ["Ada", "Bob"])
    families = {"families": np.array([0, 0, 0, 1]), "family_sizes": np.array([3, 3, 3, 1])}
    assert shares(calibration, [1.0, 1.0, 1.0, 0.5], ["Ada", "Ada", "Ada", "Bob"], **families) == pytest.approx(once)


def test_the_mass_of_weakly_similar_images_is_not_shared_out():
    """Ten thousand images at the level of unrelated ones must not outweigh the one that was copied from."""
    found = shares(flat(1.0, influence=(0.0, 10.0)), [1.0] + [0.1] * 10_000, ["Ada"] + ["Firm"] * 10_000)
    assert found == pytest.approx({"Ada": 0.9, None: 0.1})


def test_images_without_a_name_are_no_ones():
    """Paying 'unknown' to a creator called '' would look like a person in every table."""
    found = shares(flat(1.0, influence=(1.0, 11.0)), [1.0, 1.0], ["", "Ada"])
    assert found == pytest.approx({"Ada": 10 / 21, None: 11 / 21})


def test_names_below_a_hundredth_are_spread_too_thinly():
    """A table of 120 names with 0.2% each says nothing of any of them."""
    found = shares(flat(0.0, influence=(0.0, 1.0)), [1.0] + [0.005] * 100, ["Ada"] + [f"n{row}" for row in range(100)])
    assert set(found) == {"Ada", None}
    assert found[None] == pytest.approx(1 / 3)


def test_nobody_is_named_for_a_picture_that_is_not_the_generators():
    """The calibration holds for generated pictures; noise resembles some training image too."""
    calibration = flat(1.0, influence=(1.0, 11.0))
    assert shares(calibration, [0.99, 0.9], ["Ada", "Bob"], own=False) == {None: 1.0}
    assert shares(calibration, [0.99, 0.9], ["Ada", "Bob"], own=False, copies=np.array([True, False]))["Ada"] >= COPY_SHARE
    assert shares(calibration, [2.0, 0.9], ["Ada", "Bob"], own=False)["Ada"] >= COPY_SHARE  # its features are the picture's


def test_a_copy_of_the_picture_is_named_before_any_statistics():
    """No validation query shows how much an image holds that is the picture itself; thousands of others would dilute it."""
    calibration = flat(1.0, influence=(1.0, 11.0))
    similarity, names = [1.0] + [0.9] * 500, ["Ann"] + ["Firm"] * 500
    copies = np.arange(501) == 0
    assert "Ann" not in shares(calibration, similarity, names)
    with_copy = shares(calibration, similarity, names, copies=copies)
    assert with_copy["Ann"] >= COPY_SHARE
    table = share_table(
        calibration,
        np.array(similarity),
        {"creator": np.array(names), "source": np.array(["", *["corpus"] * 500])},
        by="creator",
        families=np.arange(501),
        family_sizes=np.ones(501),
        copies=copies,
    )
    assert dominant(table, "creator") == "Ann"
    assert table["creator"].tolist() == ["Ann", "Firm", UNASSIGNED]


def test_two_copies_divide_by_nearness():
    """The older drawing that the picture resembles must not take half from the one that it equals."""
    found = shares(flat(1.0, influence=(1.0, 2.0)), [2.0, 1.9], ["Ann", "Bob"], copies=np.array([True, True]))
    assert found["Ann"] > 0.75 > 0.1 > found["Bob"] - 0.1
    unknown = shares(flat(1.0, influence=(1.0, 2.0)), [1.0, 0.2], ["", "Bob"], copies=np.array([True, False]))
    assert unknown[None] > COPY_SHARE  # the copy's creator is not known: that is not Bob's


def table_of(similarity: list[float], creators: list[str], sources: list[str], by: str = "creator", level: float = 1.0):
    """A table of images that are families of their own."""
    count = len(creators)
    return share_table(
        replace(flat(level, influence=(1.0, 11.0)), knots=np.array([0.0, 0.5])),
        np.array(similarity) / 2,
        {"creator": np.array(creators), "source": np.array(sources)},
        by=by,
        families=np.arange(count),
        family_sizes=np.ones(count),
    )


def test_a_community_is_compared_as_one_with_a_firm():
    """120 people who drew a set together would each lose against the one firm that drew another."""
    people = [f"person {row}" for row in range(120)]
    similarity, creators = [0.9] * 120 + [0.8] * 30, [*people, *["Firm"] * 30]
    sources = ["community"] * 120 + ["firm's"] * 30
    by_source = table_of(similarity, creators, sources, by="source")
    assert by_source["source"].tolist() == ["community", "firm's", UNASSIGNED]
    similarity[7] = 1.0  # person 7 stands out within the community
    for level, first in ((1.0, "Firm"), (9.5, "person 7")):
        table = table_of(similarity, creators, sources, level=level)
        assert table.loc[0, "creator"] == first  # with the lower level no one of the community holds a hundredth
    assert table.loc[0, "source"] == "community"
    assert not table["named"].iloc[-1]
    assert table["share"].sum() == pytest.approx(1)


def test_a_creator_called_like_the_remainder_is_not_taken_for_it():
    """Whoever takes that name would hide in the last row, or be shown as nobody."""
    table = table_of([1.0, 0.5], [UNASSIGNED, "Bob"], ["a", "a"])
    assert table["creator"].tolist() == [UNASSIGNED, "Bob", UNASSIGNED]
    assert table["named"].tolist() == [True, True, False]
    many = table_of([1.0] * 30 + [0.2] * 30, [UNASSIGNED] * 30 + ["Bob"] * 30, ["a"] * 60)
    assert dominant(many, "creator") == UNASSIGNED
    assert dominant(table_of([1.0], ["Ada"], [""]), "creator") == "Ada"


def test_a_source_is_dominant_only_above_all_others():
    """'No dominant source' is an answer; the largest of several like shares is not a source."""
    many, one = ["Ada"] * 40 + ["Bob"] * 40 + ["Cy"] * 5, ["set"] * 85
    assert dominant(table_of([0.9] * 40 + [0.2] * 45, many, one), "creator") == "Ada"
    assert dominant(table_of([0.5] * 85, many, one), "creator") is None  # Ada's 40 and Bob's 40 are alike
    assert dominant(table_of([0.0] * 85, many, one), "creator") is None  # spread too thinly
    two = ["a"] * 40 + ["b"] * 45
    assert dominant(table_of([0.9] * 40 + [0.2] * 45, many, two), "creator") == "Ada"
    tied = table_of([0.9, 0.5, 0.9], ["Ada", "Bob", "Cy"], ["a", "a", "b"])
    assert dominant(tied, "creator") is None  # Ada leads set a, but no set leads


def test_strengths_follow_what_the_calibration_separates():
    """'Strong' for a curve that a coin could have drawn would be a decoration."""
    curves = fit_curves(*world(11, 60), corpus_size=CORPUS, resamples=50, seed=0)
    calibration = Calibration(**curves, widening=1.0, feature_mean=np.zeros(1), ownness=None)
    strengths = calibration.strengths_of(np.linspace(0, 1, 101))
    assert strengths[0] == "weak"
    assert strengths[-1] == "strong"
    order = {"weak": 0, "medium": 1, "strong": 2}
    assert sorted(strengths, key=order.get) == strengths
    similarities, scored = world(12, 60)
    shuffled = [np.random.default_rng(row).permutation(part) for row, part in enumerate(similarities)]
    nothing = fit_curves(shuffled, scored, corpus_size=CORPUS, resamples=50, seed=0)
    unrelated = Calibration(**nothing, widening=1.0, feature_mean=np.zeros(1), ownness=None)
    assert unrelated.strengths_of(np.linspace(0, 1, 5)) == [None] * 5


def test_the_level_is_what_unrelated_images_stay_below():
    """A level of the neighbours would leave nothing to share; one of all images would move with the size of the corpus."""
    whole = fit_curves(*world(13, 60), corpus_size=CORPUS, resamples=10, seed=0)
    table = fit_curves(*world(13, 60, neighbours=400, outsiders=100), corpus_size=CORPUS, resamples=10, seed=0)
    assert whole["level"].shape == table["level"].shape == (11,)
    assert table["level"][0] > 2 * table["unrelated"][0]
    assert table["queries"] == 60
    _, scored = world(14, 60, neighbours=400, outsiders=100)
    above = [
        (np.maximum(query.influence, 0) / _mean(query, 400) > table["level"][0])[query.is_outsider].mean() for query in scored
    ]
    assert np.mean(above) == pytest.approx(0.01, abs=0.006)


def _mean(query, neighbours: int) -> float:
    """Mean positive influence over the corpus, by a slow sum."""
    total = 0.0
    for value, outside in zip(query.influence.tolist(), query.is_outsider.tolist(), strict=True):
        total += max(value, 0.0) * ((CORPUS - neighbours) / 100 if outside else 1.0)
    return total / CORPUS


def attribution(calibration: Calibration | None, names: list[str], similarity: list[float]) -> Attribution:
    """An answer about as many images as names, each a family of its own."""
    catalog = pa.table({"image_id": [str(row) for row in range(len(names))], "creator": names})
    weights = None if calibration else np.array(similarity)
    reach = Reach(lambda: catalog, lambda: (np.arange(len(names)), np.array(similarity)), weights, calibration, len(catalog))
    return Attribution([], "", {}, {}, _reach=reach)


def test_a_source_is_dominant_only_if_its_interval_clears_all_others():
    """'No dominant source' is an answer; the largest of several like shares is not a source."""
    calibration = flat(1.0, influence=(1.0, 11.0))
    many = ["Ada"] * 400 + ["Bob"] * 400 + ["Cy"] * 50
    assert attribution(calibration, many, [0.9] * 400 + [0.2] * 450).dominant == "Ada"
    assert attribution(calibration, many, [0.5] * 850).dominant is None  # Ada's 400 and Bob's 400 are alike
    assert attribution(calibration, many, [0.0] * 850).dominant is None  # no one's in particular
    assert attribution(None, many, [0.9] * 850).dominant is None


def test_without_calibration_shares_are_of_the_list_and_say_so():
    """An interval that was never estimated must not be shown as zero wide."""
    table = attribution(None, ["Ada", "Bob", "Ada"], [0.5, 0.25, 0.25]).shares()
    assert table["creator"].tolist() == ["Ada", "Bob", UNASSIGNED]
    assert table["share"].tolist() == [0.75, 0.25, 0]
    assert table[["low", "high"]].isna().all(axis=None)
