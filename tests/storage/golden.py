"""A file of a policy and a qstate, letter for letter."""

GOLDEN = """\
{
  "schema": "quantjax.quantization",
  "version": 1,
  "policy": {
    "type": "Policy",
    "rules": [
      {
        "type": "Rule",
        "selector": {"type": "Path", "pattern": "*/head/kernel"},
        "scheme": {
          "type": "Scheme",
          "weights": null,
          "activations": null,
          "gradients": null,
          "outputs": null,
          "biases": null
        },
        "optional": true
      },
      {
        "type": "Rule",
        "selector": {"type": "Weighted"},
        "scheme": {
          "type": "Scheme",
          "weights": {
            "type": "Quantizer",
            "format": {
              "type": "IntegerFormat",
              "max_bits": 8,
              "signed": true,
              "scale_rule": {"scale_rule": "real"},
              "narrow": false
            },
            "bits": 4,
            "symmetric": true,
            "granularity": {
              "type": "PerGroup",
              "size": 64,
              "axis": null,
              "remainder": {"enum": "Remainder.REFUSE"}
            },
            "rule": {"range_rule": "min_max"},
            "range": {"enum": "RangeMode.FIXED"},
            "rounding": {"rounding": "half_even"},
            "estimator": {"estimator": "clipped"},
            "scaling": {"scaling": "divided"}
          },
          "activations": null,
          "gradients": null,
          "outputs": null,
          "biases": null
        },
        "optional": false
      }
    ]
  },
  "qstate": {
    "dense/kernel": {
      "weight": {
        "scale": {"shape": [2, 1], "values": [0.1, "nan"]},
        "zero_point": {"shape": [2, 1], "values": [-0.0, "inf"]},
        "bits": {"shape": [], "values": [4.0]},
        "theta": {"dict": {"step": {"tuple": [{"shape": [1], "values": [0.5]}, null]}}}
      }
    }
  }
}
"""
