"""A command's section of a page is written anew; what a hand wrote below it stays."""

from tests.faults.machine import BY_HAND, replace_section, section


def test_a_section_is_replaced_but_for_what_was_written_by_hand(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n## One\n\nold\n\n{BY_HAND}\n\nwhy so\n\n## Two\n\nolder\n")
    replace_section("One", ["new", "lines"], page)
    replace_section("Two", ["newer"], page)
    replace_section("Three", ["first"], page)
    assert page.read_text() == (
        f"# Page\n\n## One\n\nnew\nlines\n\n{BY_HAND}\n\nwhy so\n\n## Two\n\nnewer\n\n## Three\n\nfirst\n"
    )
    replace_section("One", ["newest"], page)
    assert section("One", page)[:4] == ["", "newest", "", BY_HAND] and "why so" in section("One", page)
