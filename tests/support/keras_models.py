"""Small models of Keras, trained by `fit` and compared."""

import numpy as np

from support.keras_pairs import keras


def make_model(optimizer, **compiled):
    keras.utils.set_random_seed(4)
    layers = [keras.layers.Dense(9, activation="tanh", name="a"), keras.layers.Dense(3, name="b")]
    model = keras.Sequential([keras.Input((5,)), *layers])
    model.compile(optimizer, loss="mse", **compiled)
    return model


def fit(model, **settings):
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(32, 5)).astype("f"), rng.normal(size=(32, 3)).astype("f")
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, **{"epochs": 2, **settings})
    return model


def assert_models_near(model, other, tolerance=1e-5):
    for ours, theirs in zip(model.weights, other.weights, strict=True):
        a, b = ours.numpy().astype("float64"), theirs.numpy().astype("float64")
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()
