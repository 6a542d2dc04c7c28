"""Programs and their parts: python -m utils.tools.{ablation,ccd,curves}; --demo of the training script."""
