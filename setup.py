"""Metadata of the distribution `diptych`: packages, dependencies and extras. Tools are configured in pyproject.toml."""

from setuptools import find_packages, setup

INSTALL = [
    "torch>=2.6",  # tensors, autograd, torch.distributed
    "torchvision>=0.21",  # timm needs its operators; transforms.v2 for augmentation
    "deepspeed>=0.17.5",  # ZeRO stages 0-3 and the multi-process launcher
    "packaging>=23",  # which DeepSpeed is at hand: some cannot do what others can
    "transformers>=4.56",  # hf: text towers, tokenizers from a folder, the hf export
    "timm>=1.0.21",  # every vision tower (1.0.20 cannot build one without memory for its weights)
    "webdataset>=0.2.100",  # DataPipeline, on which all data stages run
    "fsspec>=2025.5",  # shards at URLs of any other kind: s3, gs, az, hf, sftp; older ones hang in a forked worker
    "braceexpand>=0.1.7",  # shards-{00000..00099}.tar
    "requests>=2.31",  # shards by http(s): proxies, certificates, .netrc, timeouts
    "tensorboard>=2.16.2",  # curves while training (2.16.0 asks for a nightly TensorFlow)
    "pydantic>=2.8",  # config sections: types, ranges, unknown keys
    "pyyaml>=6.0",  # configs
    "tokenizers>=0.22",  # byte-level BPE: training and use (transformers 4.56 wants 0.22)
    "safetensors>=0.4.5",  # checkpoints and exports without pickle
    "pillow>=10.3",  # decode and the exact eval transform
    "simplejpeg>=1.7.4",  # JPEG straight into numpy, at 1/2 to 1/8 of the size where a crop needs no more
    "numpy>=1.26",  # order of samples, pixels before they are tensors
    "ftfy>=6.1",  # the text cleaning that CLIP's tokenizer is defined with
    "tqdm>=4.66",  # progress bars with ETA
]
EXTRAS = {
    "tools": [
        "resvg_py>=0.2.3",  # renders SVG without system libraries (older: not all at the size asked for)
        "pyarrow>=15",  # parquet: what build, encode and filter read and write (below 14.0.1 it could run code)
        "scikit-learn>=1.4",  # L-BFGS logistic regression of the linear probe
        "sacrebleu>=2.3",  # BLEU of translations, the number that papers report
        "open_clip_torch>=3.1",  # CLIP's own BPE table; verifies the open_clip export (3.0: local-dir:, 3.1: eos_id)
    ],
    "caption": ["pycocoevalcap>=1.2"],  # PTB's words and METEOR as papers have them; 104 MB, and a Java on PATH
    "s3": ["s3fs>=2025.5"],  # shards by s3://
    "gs": ["gcsfs>=2024.5"],  # shards by gs://
    "ray": ["ray>=2.9"],  # data_tools --engine ray: the same work on a cluster
    "dev": [
        "imagehash>=4.3.1",  # the definition that the perceptual hash is tested against
        "pytest>=8.0",  # the test suite
        "pytest-xdist>=3.5",  # on all cores, a file at a time
        "moto[server]>=5.0.14",  # a real S3 API on loopback, for the tests of remote shards
        "s3fs>=2025.5",  # the client that they use
        "ray>=2.9",  # a real cluster of two workers, for the tests of data_tools --engine ray
        "efficientnet_lite_pytorch>=0.1.0",  # the library whose weights model.vision.weights may name, for parity
        "ruff>=0.10",  # lint and format
        "vermin>=1.6",  # the launcher's oldest Python: syntax and standard library
        "import-linter>=2.1",  # who may import whom
        "mypy>=1.11",  # types of the foundation
        "types-PyYAML",  # stubs for mypy
    ],
}

setup(
    name="diptych",
    version="0.1.0",
    description="Distributed vision-language pretraining from WebDataset shards on DeepSpeed ZeRO",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["pretrain*", "finetune*", "data_tools*", "launcher*", "slurm*"]),
    package_data={
        "pretrain.configs": ["*.yaml"],
        "finetune.configs": ["*.yaml"],
        "finetune.configs.sweeps": ["*.yaml"],
        "slurm": ["*.sbatch", "*.sh", "*.md"],
    },
    install_requires=INSTALL,
    extras_require=EXTRAS,
)
