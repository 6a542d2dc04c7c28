"""Programs: the demo, the ablation, figures; python -m utils.tools.NAME. Only --demo imports one of them."""
