"""Names that come from a file lead below their directory, or nowhere."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge.errors import SourceError
from lora_merge.files.names import check_link, place_below

NAMES = st.one_of(
    st.lists(st.sampled_from(["..", ".", "", "a", "/", "b.safetensors", "~"]), max_size=5).map(
        "/".join
    ),
    st.text(max_size=12),
    st.none() | st.integers() | st.lists(st.text(max_size=2), max_size=2),
)


@given(name=NAMES)
def test_a_name_leads_below_its_directory_or_is_refused(name: object) -> None:
    root = Path("/nowhere/base")
    try:
        path = place_below(root, name, "index")
    except SourceError as error:
        assert "index" in str(error) and error.remedy
        return
    assert isinstance(name, str)
    assert path.resolve().is_relative_to(root) and path.resolve() != root


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/x", "", " ", "a\0b", "a\nb", "a\\b", "C:x", "x" * 256, 3]
)
def test_what_leads_out_is_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        place_below(tmp_path, name, "index")


def test_links_stay_in_their_directory_or_in_the_hubs_cache(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "outside").write_text("x")
    (base / "file").write_text("x")
    (base / "inside").symlink_to("file")
    (base / "out").symlink_to("../outside")
    (base / "loop").symlink_to("loop")
    assert place_below(base, "inside", "index") == base / "inside"
    for name in ("out", "loop"):
        with pytest.raises(SourceError):
            place_below(base, name, "index")
    (tmp_path / "named").symlink_to(base)  # the directory itself may be a link
    place_below(tmp_path / "named", "file", "index")

    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    for folder in (snapshot, cache / "blobs", cache / "refs"):
        folder.mkdir(parents=True)
    (cache / "blobs" / "abc").write_text("x")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    check_link(snapshot, snapshot / "model.safetensors", "index")
    (snapshot / "other").symlink_to("../../../outside")
    with pytest.raises(SourceError, match="leads out"):
        check_link(snapshot, snapshot / "other", "index")
