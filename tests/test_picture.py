"""experiments/picture.py draws what a run wrote."""
from PIL import Image
from scripts import run


def test_the_moving_picture(tmp_path):
    """Grey blocks become black text in ten seconds."""
    path = tmp_path / "denoise.gif"
    result = run("experiments/picture.py", "--max_new_tokens=12", "--steps=6", f"--output={path}")
    assert result.status == 0, result.err
    assert "def read(self, size=-1):" in result.out and "6 steps" in result.out
    with Image.open(path) as picture:
        assert picture.format == "GIF" and picture.width == 700
        assert 6 < picture.n_frames <= 1 + 6 + 4        # frames that are equal become one
        milliseconds, darkest = 0, []
        for number in range(picture.n_frames):
            picture.seek(number)
            milliseconds += picture.info["duration"]
            frame = picture.convert("L").crop((0, 52, 700, picture.height - 40))    # generated text
            darkest.append(frame.getextrema()[0])
    assert abs(milliseconds - 10_000) < 200
    assert darkest[0] > 200 and darkest[-1] < 60


def test_a_mistake_is_one_line(tmp_path):
    result = run("experiments/picture.py", "--remasking=best", f"--output={tmp_path}/x.gif")
    assert result.status == 2
    assert result.err.startswith("error: remasking must be one of") and result.err.count("\n") == 1
