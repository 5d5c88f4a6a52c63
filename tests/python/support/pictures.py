"""Pictures that are written."""

import matplotlib.image


def assert_picture(path):
    """It is whole, of the size of a figure, and something is drawn."""
    image = matplotlib.image.imread(path, format="png")
    assert min(image.shape[:2]) > 200, path.name
    assert image[..., :3].std() > 0.01, path.name
