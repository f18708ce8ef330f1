"""A finetune as its owner has it: the transformer alone, in the place of the base model's own.

    FOLDER with config.json and safetensors     as save_pretrained of a transformer leaves it; its config.json counts
    FILE.safetensors, diffusers' names          the base model's configuration counts
    FILE.safetensors, names of Wan's, LTX-Video's
      or HunyuanVideo's own code                likewise; its tensors get diffusers' names (qvgen.models.original.names)

Names may have a prefix (``model.diffusion_model.``), and a file may hold a VAE and text encoders beside it, which are not
read. Everything else comes from the base model's folder. Nothing is unpickled and no configuration names code.

CogVideoX's original layout (SAT) is refused: diffusers has no converter of a file of it, but a script that writes a folder.
"""
