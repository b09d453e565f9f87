"""experiments/picture.py draws what a run wrote."""
from PIL import Image
from scripts import run


def test_the_moving_picture(tmp_path):
    """Grey blocks become a black text and a solved grid in ten seconds."""
    path = tmp_path / "denoise.gif"
    result = run("experiments/picture.py", "--prompt=Once there was", "--max_new_tokens=12",
                 "--steps=6", f"--output={path}")
    assert result.status == 0, result.err
    assert "Once there was" in result.out and " steps" in result.out
    assert "solved: " in result.out
    with Image.open(path) as picture:
        assert picture.format == "GIF" and picture.width == 840
        assert 4 < picture.n_frames <= 1 + 6 + 4        # frames that are equal become one
        milliseconds, darkest = 0, []
        for number in range(picture.n_frames):
            picture.seek(number)
            milliseconds += picture.info["duration"]
            frame = picture.convert("L").crop((30, 54, 500, picture.height - 40))  # generated text
            darkest.append(frame.getextrema()[0])
    assert abs(milliseconds - 10_000) < 200
    assert darkest[0] > 200 and darkest[-1] < 60


def test_a_mistake_is_one_line(tmp_path):
    result = run("experiments/picture.py", "--remasking=best", f"--output={tmp_path}/x.gif")
    assert result.status == 2
    assert result.err.startswith("error: remasking must be one of") and result.err.count("\n") == 1
