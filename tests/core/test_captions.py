"""fastattr/core/captions.py: subjects and styles, in one spelling everywhere."""

from __future__ import annotations

from fastattr.core.captions import recombinations, recombine, split_caption


def test_captions_split_at_their_last_comma():
    assert split_caption("family: man, boy, noto style") == ("family: man, boy", "noto style")
    assert split_caption("red heart") == ("red heart", "")
    assert recombine("family: man, boy, noto style", "fluent style") == "family: man, boy, fluent style"


def test_recombinations_are_all_pairs_that_no_caption_has():
    captions = ["cat, flat style", "dog, inked style", "cat, inked style", "bird", "ant, wavy style"]
    assert recombinations(captions) == [
        *[(4, "flat style"), (4, "inked style")],
        *[(3, "flat style"), (3, "inked style"), (3, "wavy style")],
        (0, "wavy style"),
        *[(1, "flat style"), (1, "wavy style")],
    ]
