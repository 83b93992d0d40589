"""Everything that is SGLang's own."""
