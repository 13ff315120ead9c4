"""The contact sheet."""

from PIL import Image

from klora.report.sheet import contact_sheet


def test_pictures_lie_in_rows_and_columns_enlarged_pixel_by_pixel() -> None:
    colours = ["red", "lime", "blue", "yellow", "cyan", "magenta", "black", "gray"]
    pictures = [Image.new("RGB", (4, 4), colour) for colour in colours]
    groups = [[pictures[0:2], pictures[2:4]], [pictures[4:6], pictures[6:8]]]
    sheet = contact_sheet(groups, [("one", ""), ("two", "")], [("a", "x"), ("b", "y")], side=20)
    places = {}
    for colour in ("red", "lime", "blue", "yellow", "cyan", "magenta"):
        wanted = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        found = [(x, y) for x in range(sheet.width) for y in range(sheet.height) if sheet.getpixel((x, y)) == wanted]
        assert len(found) == 20 * 20
        places[colour] = min(found)
    assert places["red"][1] == places["lime"][1] == places["blue"][1] == places["yellow"][1] < places["cyan"][1]
    assert places["red"][0] < places["lime"][0] < places["blue"][0] < places["yellow"][0]
    assert places["red"][0] == places["cyan"][0]


def test_pictures_larger_than_the_side_keep_their_size() -> None:
    sheet = contact_sheet([[[Image.new("RGB", (40, 30), "red")]]], [("one", "")], [("a", "")], side=20)
    assert (255, 40 * 30) in [(colour[0], count) for count, colour in sheet.getcolors(2**16) if colour == (255, 0, 0)]
