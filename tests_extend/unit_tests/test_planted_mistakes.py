"""The mistakes that planted_mistakes.py plants are still to be planted somewhere."""

from planted_mistakes import MISTAKES, ROOT


def test_each_mistake_has_one_place_in_the_library():
    places = {
        name: (ROOT / "mindspeed_cp" / each.file).read_text().count(each.right) for name, each in MISTAKES.items()
    }
    assert places == dict.fromkeys(MISTAKES, 1)
    assert len(MISTAKES) >= 10
