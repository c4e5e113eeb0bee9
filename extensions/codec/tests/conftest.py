"""A bundle that codes, and what it compresses."""

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, small_images):
    from extensions.codec.tests.models import make_bundle  # which needs an extra

    folder = tmp_path_factory.mktemp("bundles") / "av-ade"
    return make_bundle(folder, "av-ade", small_images, scores=True)


@pytest.fixture
def folder(tmp_path, small_images):
    """Plain images, and every kind that is stored differently."""
    folder = tmp_path / "images"
    for i, image in enumerate(small_images[:150]):
        path = folder / f"class {i % 3}" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    Image.fromarray(small_images[0]).resize((40, 20)).save(folder / "wide.png")
    Image.fromarray(small_images[1]).convert("L").save(folder / "grey.png")
    Image.fromarray(small_images[2]).convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(small_images[3]).save(folder / "photo.jpg")
    Image.fromarray(small_images[4]).save(folder / "bitmap.bmp")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "empty.png").write_bytes(b"")
    return folder


@pytest.fixture
def archived(bundle, small_images, tmp_path, monkeypatch):
    """An archive of an array in four chunks."""
    from extensions.codec import compress as compressing
    from extensions.codec.tests.models import save_array

    monkeypatch.setattr(compressing, "MAX_IMAGES", 40)
    source = save_array(tmp_path / "in.npy", small_images[:150])
    assert compressing.compress(source, tmp_path / "out.ade", bundle).figures.coded > 40
    return tmp_path / "out.ade"
