"""A recurrent language model; it knows nothing of quantization."""

from __future__ import annotations

import flax.linen as nn
import jax

from experiments.models.attention import check_tokens


class LanguageLSTM(nn.Module):
    """Embedded tokens through layers of LSTM cells, then one dense layer.

    Attributes:
      vocabulary: tokens that there are.
      width: features of an embedded token.
      hidden: features of each cell's state.
      layers: how many.

    >>> import jax.numpy as jnp
    >>> model = LanguageLSTM(vocabulary=11, width=4, hidden=6)
    >>> tokens = jnp.array([[1, 5, 7]])
    >>> model.apply(model.init(jax.random.key(0), tokens), tokens).shape
    (1, 3, 11)

    Source: Hochreiter and Schmidhuber, Long short-term memory, 1997, with the forget gate of Gers,
    Schmidhuber and Cummins, Learning to forget: continual prediction with LSTM, 2000; as a language
    model in Zaremba, Sutskever and Vinyals, Recurrent neural network regularization, 2014.
    """

    vocabulary: int = 512
    width: int = 128
    hidden: int = 128
    layers: int = 1

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the token after each, ``(batch, length, vocabulary)`` of ``(batch, length)``.

        Raises:
          ModelShapeError: tokens are no integers of this shape.
        """
        check_tokens(tokens, max(tokens.shape[-1], 1) if tokens.ndim else 1)
        x = nn.Embed(self.vocabulary, self.width, name="embedding")(tokens)
        for index in range(self.layers):
            x = nn.RNN(nn.LSTMCell(self.hidden, name=f"layer{index}"))(x)
        return nn.Dense(self.vocabulary, name="linear")(x)
