"""The real thing on the CPU platform: an engine that answers a request."""


def main() -> None:
    """Start, answer, stop."""
    from econoserve import Engine, demo_model

    engine = Engine(
        model_path=str(demo_model.ensure()),
        device="cpu",
        dtype="float32",
        max_total_tokens=2048,
        enable_custom_logit_processor=True,
    )
    try:
        engine.generate(input_ids=[[5, 6, 7]], sampling_params={"max_new_tokens": 4})
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
