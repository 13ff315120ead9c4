"""What people touch in a WebUI.

The way of a tag through this room: what the accordion or the API says (`ui`, `args`) becomes a tag that the always-on
script writes into the prompts (`script`, `injection`); a typed one is there already. The host parses it and calls our
handler (`extra_network`), which reads it (`prompt_tag`, `sides`), opens its files (`requested_fusion`) and hangs an
`ActiveFusion` on the host's processing object (in SD.Next a `PipelineFusion`). That one has the text encoder's part
applied while the prompt is encoded, takes the pair's files out of the host's own LoRAs, and before each evaluation of
the model, which `on_evaluation` hears of, tells its session the noise level. When sampling ends, however it ends, every
hook comes off (`attached_sessions`), and the picture's text says what acted (`acted`, `picture_text`). A pasted text
goes the other way (`paste`, `infotext`). `register` puts all of it into the host and takes it out again.
"""
