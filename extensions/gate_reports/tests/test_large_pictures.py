"""Reports on gates of which an encoder sees the originals of pictures."""

from ade_base.pictures.show import write_png
from ade_cli.main import main
from export.gate.corruptions import CORRUPTIONS


def test_reports_judge_the_originals(seeing_bundle, large_images, small_images, tmp_path, capsys):
    """Also among images of the model's size, for which the encoder has another memory."""
    folder = tmp_path / "large"
    folder.mkdir()
    for number, image in enumerate(large_images[60:84]):
        (folder / f"{number:03}.png").write_bytes(write_png(image))
    (folder / "small.png").write_bytes(write_png(small_images[299]))
    words = ["ood-bench", str(seeing_bundle), "--id", str(folder)]
    assert main([*words, "--corrupt", "5", "--out", str(tmp_path / "out")]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "without those of `features.onnx` and `encoder.onnx`" in report
    assert all(name in report for name in CORRUPTIONS)
