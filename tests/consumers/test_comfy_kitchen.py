"""profile=convrot and profile=int8 compute what comfy-kitchen computes in ComfyUI: its eager functions, in float32."""

import json


def test_layers_are_what_comfy_kitchen_computes(run_consumer):
    results = json.loads(run_consumer("comfy-kitchen==0.2.40", "comfy_kitchen_program.py"))
    assert len(results) == 8
    for name, result in results.items():
        assert result["codes_equal"], name
        assert result["difference"] == 0.0, name
        if name.startswith("convrot"):
            assert result["rotation"] == (256 if name.endswith("1536") else 64)
            # Theirs is a product with the matrix, which sums in an order of its own.
            assert result["rotation_difference"] < 1e-6, name
            assert result["whole_difference"] < 1e-5, name
