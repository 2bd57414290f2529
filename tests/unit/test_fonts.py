"""The letters on contact sheets and grids."""

import numpy as np

from glide_ray.evaluation import fonts
from glide_ray.evaluation.report import contact_sheet, grid, stairs

LETTERS = "ein grüner Baum, café, Привет → × —"


def test_sheets_render_accents_cyrillic_and_arrows():
    font = fonts.font_for(LETTERS, 12)
    assert not fonts.missing(LETTERS, font) and fonts.readable(LETTERS, font) == LETTERS
    image = np.full((64, 64, 3), 128, np.uint8)
    for sheet in (
        lambda label: contact_sheet([image], [label], title=label),
        lambda label: grid([[image]], [label], [label]),
        lambda label: stairs([image], [label]),
    ):
        # A missing letter is an empty box, the same for every missing letter.
        assert not np.array_equal(np.asarray(sheet("ü → П")), np.asarray(sheet("é × Ж")))


def test_a_missing_glyph_is_replaced_by_its_base_letter_or_code_point(monkeypatch):
    own = fonts.ImageFont.load_default(12)
    assert fonts.readable("grüner café, 中", own) == "gruner cafe, [4E2D]"
    monkeypatch.setattr(fonts, "_of_matplotlib", lambda: None)
    monkeypatch.setattr(fonts, "SYSTEM", ())
    fonts.fonts.cache_clear()
    try:
        contact_sheet([np.zeros((8, 8, 3), np.uint8)], [LETTERS], title=LETTERS)
    finally:
        fonts.fonts.cache_clear()
